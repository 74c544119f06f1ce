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
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases.rounds import Moves, Payload, new_names
from benchmarks.rivals.workload import PREFIX_BLOCKS, REQUEST_BLOCKS, Bytes
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.connector.copier import make_copier
from shared_cache.connector.copies import BlockCopier, BlockLoad
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
RESERVE_AHEAD = 128
"""Two turns of 2,048 tokens; an arena that allows that has eight times as many blocks."""

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
def owned(host: HostConfig, admission: str = "never") -> Iterator[None]:
    """The arena's owner, in a process of its own; clients wait until it serves."""
    arguments = [f"--name={host.name}", f"--bytes={int(host.bytes)}", f"--folder={host.folder}"]
    arguments += ["--populate"] if host.populate else []
    command = [sys.executable, "-m", "shared_cache.host", *arguments, f"--admission={admission}"]
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
    source: BlockCopier,
    rows: Sequence[int],
    publish: Publish = commit,
    parent: BlockHash = ROOT_HASH,
) -> None:
    """Put consecutive blocks as the connector does: reserve, copy and checksum, publish."""
    host, done = cache.host, 0
    # The cache counts what it will be given: a flush waits for that.
    reserve = cache.reserve if publish is commit_in_background else host.reserve
    while done < len(names):
        slots = reserve(len(names) - done)
        if not slots:  # they are reserved ahead by a thread
            time.sleep(WAIT_S)
            continue
        part = slice(done, done + len(slots))
        run = NewRun(names[done - 1] if done else parent, tuple(names[part]))

        def on_done(_: float, checksums: Sequence[int], slots=slots, run=run) -> None:
            publish(cache, slots, replace(run, checksums=tuple(checksums)))

        buffers = map(host.buffer, slots)
        source.save(list(zip(buffers, rows[part], names[part], strict=True)), None, on_done, _fail)
        done = part.stop


def _fail(error: Exception) -> None:
    raise SystemExit(f"copying failed: {error}")


def load(
    cache: SharedCache, names: Sequence[BlockHash], pool: BlockCopier, rows: Sequence[int]
) -> None:
    """Get one request's blocks: lease (and verify, if configured), copy, end the lease."""
    staged = cache.lease(names)
    if staged.num_blocks != len(names):
        raise SystemExit(f"only {staged.num_blocks} of {len(names)} blocks are in the arena")
    (place,) = cache.places(staged)
    pool.load([BlockLoad(cache.host.blocks_at(place), rows)], None)
    cache.release(staged)


def copier(blocks: Bytes) -> BlockCopier:
    """The connector's copier for a pool of blocks."""
    return make_copier(torch.from_numpy(blocks))


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
        self._source, self._pool = copier(payload.source), copier(payload.pool)
        self._names: tuple[BlockHash, ...] = ()
        self._fill()

    def before_put(self, round_number: int) -> None:
        self._names = new_names(f"{self.name} {round_number}", self.payload.num_blocks)

    def _put(self) -> None:
        for blocks in self.payload.prefixes(self._batch):
            names = self._names[blocks.start : blocks.stop]
            parent = self._names[blocks.start - 1] if blocks.start else ROOT_HASH
            save(self._cache, names, self._source, blocks, self._publish, parent)
        if not self._cache.flush(FLUSH_S):
            raise SystemExit("blocks were not published in time")

    def _get(self) -> None:
        for blocks in self.payload.prefixes(REQUEST_BLOCKS):
            names = self._names[blocks.start : blocks.stop]
            load(self._cache, names, self._pool, self.payload.slots[blocks.start : blocks.stop])

    def _fill(self) -> None:
        """Until something is evicted, so that all of the arena's memory has been touched."""
        number = 0
        while not self._cache.host.stats().evicted_blocks:
            blocks = range(min(PREFIX_BLOCKS, self.payload.num_blocks))
            names = new_names(f"fill {number}", len(blocks))
            save(self._cache, names, self._source, blocks)
            number += 1
