"""Blocks from a store's files into memory by system calls alone: what a fetch could reach.

In threads of this process, or of several ones that map the same arena: the difference is what the
interpreter's lock costs. Such a process runs this module and is told by lines of JSON what to read;
it imports neither torch nor the cache, so that eight of them are there in a moment.
"""

import json
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

TOUCH_BYTES = 2 << 20

Hashing = Literal["none", "pieces", "block"]
"""No checksum, one that is fed each piece right after it was read, or one call for a whole block
that is there. They are the same in number; an old xxhash keeps the interpreter's lock in the last.
"""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block's place in a file and in the arena's memory, in bytes, and its checksum."""

    path: str
    start: int
    place: int
    seed: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Way:
    """How all blocks are read: by so many threads of a process, `piece_bytes` a system call."""

    num_threads: int
    piece_bytes: int
    hashing: Hashing


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of the clock, and of this process in user and in system mode."""

    wall_s: float
    user_s: float
    system_s: float


def timed(call: Callable[[], object]) -> Took:
    """What `call` took, all threads of the process counted."""
    before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
    return Took(wall_s, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)


class Reads:
    """Reads each block into its view, touched before; files stay open until `close`."""

    def __init__(self, blocks: Sequence[StoredBlock], views: Sequence[memoryview]) -> None:
        paths = {block.path for block in blocks}
        self._files = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths}
        self._views = list(zip(blocks, views, strict=True))

    def run(self, way: Way, index: int = 0, step: int = 1) -> Took:
        """Read every `step`-th block from `index` on; ends the program when one is damaged."""
        waiting, damaged = iter(self._views[index::step]), list[str]()
        begun = threading.Barrier(way.num_threads + 1)

        def work() -> None:
            begun.wait()
            for block, view in waiting:
                if not self._is_good(block, view, way):
                    damaged.append(block.path)

        threads = [threading.Thread(target=work) for _ in range(way.num_threads)]
        for thread in threads:
            thread.start()

        def read_all() -> None:
            begun.wait()
            for thread in threads:
                thread.join()

        took = timed(read_all)
        if damaged:
            raise SystemExit(f"{len(damaged)} blocks are damaged: {damaged[0]}")
        return took

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._views.clear()

    def _is_good(self, block: StoredBlock, view: memoryview, way: Way) -> bool:
        descriptor, digest = self._files[block.path], xxhash.xxh3_64(seed=block.seed)
        is_streamed = way.hashing == "pieces"
        for position in range(0, view.nbytes, way.piece_bytes):
            piece = view[position : position + way.piece_bytes]
            if os.preadv(descriptor, [piece], block.start + position) < piece.nbytes:
                return False
            if is_streamed:
                digest.update(piece)
        if way.hashing == "none":
            return True
        if is_streamed:
            return digest.intdigest() == block.checksum
        return xxhash.xxh3_64_intdigest(view, seed=block.seed) == block.checksum


class ReaderProcess:
    """A process of its own that knows the same blocks and maps the file `arena`."""

    def __init__(self, arena: Path, blocks: Sequence[StoredBlock], block_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cases.page_cache"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tell([str(arena), block_bytes, [asdict(block) for block in blocks]])

    def tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to what was told last; ends the program when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process that reads has ended")
        return json.loads(line)

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(10)


@contextmanager
def reader_processes(
    num_processes: int, arena: Path, blocks: Sequence[StoredBlock], block_bytes: int
) -> Iterator[list[ReaderProcess]]:
    """So many processes, ready to read."""
    with ExitStack() as opened:
        processes = []
        for _ in range(num_processes):
            processes.append(ReaderProcess(arena, blocks, block_bytes))
            opened.callback(processes[-1].close)
        for process in processes:
            process.answer()
        yield processes


def read_in(processes: Sequence[ReaderProcess], way: Way) -> Took:
    """Have `processes` share the blocks and read them; their CPU time together."""
    start_s = time.perf_counter()
    for index, process in enumerate(processes):
        process.tell([asdict(way), index, len(processes)])
    answers = [process.answer() for process in processes]
    wall_s = time.perf_counter() - start_s
    return Took(wall_s, *(sum(one[name] for one in answers) for name in ("user_s", "system_s")))


def serve() -> None:
    """A reader process: maps and touches the arena, then reads as it is told, line by line."""
    path, block_bytes, blocks = json.loads(sys.stdin.readline())
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = [StoredBlock(**block) for block in blocks]
    views = [memoryview(memory)[one.place : one.place + block_bytes] for one in found]
    reads = Reads(found, views)
    reads.run(Way(1, TOUCH_BYTES, "none"))  # touches the memory, too
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        way, index, step = json.loads(line)
        print(json.dumps(asdict(reads.run(Way(**way), index, step))), flush=True)


if __name__ == "__main__":
    serve()
