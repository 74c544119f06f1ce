"""The node-shared arena as a replica uses it: through `open_cache`, with its owner's process.

The owner is started here and ends here: one that a client starts outlives it by minutes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.cases.rounds import Moves, Payload, new_names
from benchmarks.rivals.workload import PREFIX_BLOCKS
from shared_cache.checksum import block_checksum
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import NewRun
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache

LAYOUTS = {
    "720KiB": BlockLayout(30, 2, 3, 32, 64, "bfloat16"),
    "1.25MiB": BlockLayout(80, 2, 1, 32, 128, "bfloat16"),
    "4MiB": BlockLayout(32, 2, 8, 32, 128, "bfloat16"),
}
ROOT_HASH = ReuseScope().root_hash()
RESERVE_AHEAD = 64
"""A prefix; the smallest arena whose rules allow that has eight times as many blocks."""

WAIT_S = 0.0001
"""For the thread that reserves ahead."""

FLUSH_S = 60.0

Publish = Callable[[SharedCache, Sequence[int], NewRun], None]


def namespace(size: str) -> Namespace:
    """The namespace of blocks of one of `BLOCK_SIZES`."""
    return Namespace(f"benchmark-{size}", "0", "benchmark", LAYOUTS[size])


def host_config(folder: Path, num_bytes: int, *, verify: bool = False) -> HostConfig:
    """An arena of its own in `folder`; every process that says the same shares it."""
    return HostConfig.model_validate(
        {
            "bytes": num_bytes,
            "name": "verified" if verify else "benchmark",
            "folder": str(folder),
            "start_owner": False,
            "verify_every_load": verify,
            "reserve_ahead": RESERVE_AHEAD,
        }
    )


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A private folder in memory, gone afterwards."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvcommons-bench-", dir=shm) as name:
        yield Path(name)


@contextmanager
def owned(host: HostConfig) -> Iterator[None]:
    """The arena's owner, in a process of its own; clients wait until it serves."""
    arguments = [f"--name={host.name}", f"--bytes={int(host.bytes)}", f"--folder={host.folder}"]
    command = [sys.executable, "-m", "shared_cache.host", *arguments, "--admission=never"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def opened(host: HostConfig, space: Namespace) -> Iterator[SharedCache]:
    """A cache of the arena alone, for this process."""
    cache = open_cache(CacheConfig(host=host), space)
    try:
        yield cache
    finally:
        cache.close()


def commit(cache: SharedCache, slots: Sequence[int], run: NewRun) -> None:
    """Publish written blocks; end the lease."""
    lease = cache.host.commit(slots, run)
    if len(lease.slots) != len(slots):
        raise SystemExit(f"only {len(lease.slots)} of {len(slots)} blocks were taken")
    cache.host.release(lease)


def commit_in_background(cache: SharedCache, slots: Sequence[int], run: NewRun) -> None:
    """The same by the cache's own thread, while the next blocks are copied; see `cache.flush`."""
    cache.save(slots, run)


def save(
    cache: SharedCache,
    names: Sequence[BlockHash],
    payloads: Sequence[memoryview],
    publish: Publish = commit,
) -> None:
    """Put consecutive blocks as the connector does: reserve, copy and checksum each, publish."""
    host, done = cache.host, 0
    while done < len(names):
        slots = host.reserve(len(names) - done)
        if not slots:  # they are reserved ahead by a thread
            time.sleep(WAIT_S)
            continue
        end = done + len(slots)
        checksums = []
        for slot, name, payload in zip(slots, names[done:end], payloads[done:end], strict=True):
            np.copyto(np.frombuffer(host.buffer(slot), np.uint8), np.frombuffer(payload, np.uint8))
            checksums.append(block_checksum(name, payload))
        parent = names[done - 1] if done else ROOT_HASH
        run = NewRun(parent, tuple(names[done:end]), checksums=tuple(checksums))
        publish(cache, slots, run)
        done = end


def load(cache: SharedCache, names: Sequence[BlockHash], targets: Sequence[memoryview]) -> None:
    """Get one request's blocks: lease (and verify, if configured), copy, end the lease."""
    staged = cache.lease(names)
    if staged.num_blocks != len(names):
        raise SystemExit(f"only {staged.num_blocks} of {len(names)} blocks are in the arena")
    for slot, target in zip(staged.lease.slots, targets, strict=True):
        buffer = cache.host.buffer(slot)
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(buffer, np.uint8))
    cache.release(staged)


class Arena(Moves):
    """The host tier, one client: `batch` blocks are put at a time, each prefix is got as a whole.

    The arena is full when the clock starts, as it is in service: every put evicts.
    """

    def __init__(
        self,
        name: str,
        cache: SharedCache,
        payload: Payload,
        publish: Publish = commit,
        batch: int = PREFIX_BLOCKS,
    ) -> None:
        super().__init__(name, payload)
        self._cache = cache
        self._publish = publish
        self._batch = batch
        self._names: list[tuple[BlockHash, ...]] = []
        self._fill()

    def before_put(self, round_number: int) -> None:
        self._names = [
            new_names(f"{self.name} {round_number} {blocks.start}", len(blocks))
            for blocks in self.payload.prefixes()
        ]

    def _put(self) -> None:
        for names, blocks in zip(self._names, self.payload.prefixes(), strict=True):
            for start in range(0, len(blocks), self._batch):
                part = slice(start, start + self._batch)
                payloads = self.payload.payloads(blocks[part])
                save(self._cache, names[part], payloads, self._publish)
        if not self._cache.flush(FLUSH_S):
            raise SystemExit("blocks were not published in time")

    def _get(self) -> None:
        for names, blocks in zip(self._names, self.payload.prefixes(), strict=True):
            load(self._cache, names, self.payload.targets(blocks))

    def _fill(self) -> None:
        """Until something is evicted, so that all of the arena's memory has been touched."""
        number = 0
        while not self._cache.host.stats().evicted_blocks:
            blocks = range(min(PREFIX_BLOCKS, self.payload.num_blocks))
            names = new_names(f"fill {number}", len(blocks))
            save(self._cache, names, self.payload.payloads(blocks))
            number += 1
