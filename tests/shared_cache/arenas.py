"""Arenas for tests: short folders in memory, an owner in a thread, one that can be killed, clients.

Every block's bytes are made from its hash, so whoever reads a block can tell whether it is right.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared_cache.config import HostConfig
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host import protocol as wire
from shared_cache.host.folder import ArenaPaths, HeldLock
from shared_cache.host.interface import HostLease, HostTier, NewRun
from shared_cache.host.node import NodeHostTier, open_node_tier
from shared_cache.host.owner import ArenaOwner, rules_of

BLOCK_BYTES = 16384
ROOT = BlockHash(bytes(32))
WAIT_S = 20.0


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder of our own on the memory file system, with a short name; gone afterwards."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="kvc-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def host_config(folder: Path, **settings: Any) -> HostConfig:
    fields: dict[str, Any] = {"bytes": 4 << 20, "folder": str(folder), "start_owner": False}
    return HostConfig(**{**fields, **settings})


def paths_of(config: HostConfig) -> ArenaPaths:
    assert config.folder is not None
    return ArenaPaths(Path(config.folder), config.name)


class OwnerThread:
    """An owner in this process, with its event loop in a thread."""

    def __init__(self, config: HostConfig, exit_when_idle_s: float | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.owner = ArenaOwner(config, rules_of(config, "always"), exit_when_idle_s)
        try:
            self.run(self.owner.start())
        except BaseException:
            self._end_loop()
            raise

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def close(self) -> None:
        self.run(self.owner.stop())
        self._end_loop()

    def _end_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@contextmanager
def running_owner(config: HostConfig, **options: Any) -> Iterator[OwnerThread]:
    owner = OwnerThread(config, **options)
    try:
        yield owner
    finally:
        owner.close()


class OwnerProcess:
    """An owner in a process of its own, to be killed and stopped as one likes."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "shared_cache.host", "--name", self._config.name]
        command += ["--bytes", str(int(self._config.bytes)), "--folder", str(self._config.folder)]
        for salt, limit in self._config.quotas.items():
            command += ["--quota", f"{ReuseScope(salt).tenant.hex()}={int(limit)}"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        await_true(lambda: self.process.poll() is not None or can_connect(self._config))
        assert self.process.poll() is None, "the owner did not start"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait(WAIT_S)


@contextmanager
def owner_process(config: HostConfig) -> Iterator[OwnerProcess]:
    owner = OwnerProcess(config)
    try:
        yield owner
    finally:
        owner.close()


@contextmanager
def background_owners(
    config: HostConfig,
) -> Iterator[tuple[HostConfig, Callable[[], set[int]]]]:
    """`config`, and the processes of the owners that clients have started; all end with this."""
    log = paths_of(config).log
    known: set[int] = set()

    def owners() -> set[int]:
        lines = log.read_text().splitlines() if log.exists() else []
        started = [line for line in lines if "owns the arena" in line]
        known.update(int(line.split("process ")[1].split()[0]) for line in started)
        return set(known)

    try:
        yield config, owners
    finally:
        for owner in owners():
            with suppress(ProcessLookupError):
                os.kill(owner, signal.SIGKILL)


@contextmanager
def open_tier(config: HostConfig, namespace: str = "one", **options: Any) -> Iterator[NodeHostTier]:
    tier = open_node_tier(config, namespace, options.pop("block_bytes", BLOCK_BYTES), **options)
    try:
        yield tier
    finally:
        tier.close()


class ClientProcess:
    """A client in a process of its own, see `arena_clients`."""

    def __init__(self, config: HostConfig, task: str, seed: int = 0) -> None:
        command = [sys.executable, "-m", "tests.shared_cache.arena_clients"]
        self.process = subprocess.Popen(
            [*command, task, str(config.folder), config.name, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def report(self) -> dict[str, int]:
        """The next line that the client has to say."""
        assert self.process.stdout is not None
        report: dict[str, int] = json.loads(self.process.stdout.readline())
        return report

    def finish(self) -> dict[str, int]:
        """Ask the client to end; its last line."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.report()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def client_process(config: HostConfig, task: str, seed: int = 0) -> Iterator[ClientProcess]:
    client = ClientProcess(config, task, seed)
    try:
        yield client
    finally:
        client.close()


class RawClient:
    """Speaks the protocol, or anything else, as plain bytes; has no locked file unless asked."""

    def __init__(self, config: HostConfig, holder: int = 7, *, is_alive: bool = False) -> None:
        paths = paths_of(config)
        self.holder = holder
        self.file = HeldLock.acquire(paths.client(holder)) if is_alive else None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(paths.socket))
        self._frames = wire.FrameReader()
        self._answers: list[wire.OwnerMessage] = []

    def attach(self, namespace: str = "one", block_bytes: int = BLOCK_BYTES, **held: Any) -> Any:
        message = wire.Attach(wire.PROTOCOL_VERSION, self.holder, namespace, block_bytes, **held)
        return self.ask(message)

    def ask(self, message: wire.Message) -> Any:
        with suppress(BrokenPipeError, ConnectionResetError):  # cut off already
            self.send(message)
        return self.answer()

    def send(self, message: wire.Message) -> None:
        self.socket.sendall(wire.encode_frame(message))

    def answer(self) -> Any:
        """The next answer; None when the connection is closed."""
        while not self._answers:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._answers += map(wire.owner_decoder.decode, self._frames.feed(data))
        return self._answers.pop(0)

    def close(self) -> None:
        if self.file is not None:
            self.file.release()
        self.socket.close()


def can_connect(config: HostConfig) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(paths_of(config).socket)) == 0


def await_true(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Wait until something that another process does has happened."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def hashes_of(label: object, num_blocks: int) -> list[BlockHash]:
    """A chain's worth of names."""
    return [
        BlockHash(hashlib.sha256(f"{label} {index}".encode()).digest())
        for index in range(num_blocks)
    ]


def payload_of(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> bytes:
    return block_hash * (block_bytes // len(block_hash))


def bring(tier: HostTier, hashes: Sequence[BlockHash], **fields: Any) -> HostLease:
    """Claim the missing blocks, write them, and lease all of them."""
    claim = tier.claim(hashes)
    start = len(claim.lease.slots)
    new = tuple(hashes[start : start + len(claim.slots)])
    for block_hash, slot in zip(new, claim.slots, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash, tier.block_bytes)
    parent = hashes[start - 1] if start else ROOT
    tier.release(tier.commit(claim.slots, NewRun(parent, new, **fields)))
    tier.release(claim.lease)
    return tier.lease(hashes)


def is_right(tier: HostTier, block_hash: BlockHash, slot: int) -> bool:
    return bytes(tier.buffer(slot)) == payload_of(block_hash, tier.block_bytes)
