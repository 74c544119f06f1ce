"""The rival on S3, s3fs with one object per block, and our store on the same server and bytes.

    python -m benchmarks.rivals.s3_clients --mib 4 --blocks 32 --rounds 5

prints GB/s of both and their ratio. The rival checks nothing; ours verifies every block.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import s3fs

from benchmarks.rivals.s3_server import S3Server, running_s3_server
from shared_cache.hashing import BlockHashChain
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.stores.fs_store import FsBlockStore, open_store
from shared_cache.stores.store import BlockRun

TOKENS_PER_BLOCK = 32


class S3fsObjects:
    """One object per block through s3fs, as a store without runs keeps them.

    `at_once`: requests in flight; 1 asks for one block after the other.
    """

    def __init__(self, server: S3Server, at_once: int = 8) -> None:
        self._fs = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
        self._folder = f"{server.bucket}/s3fs"
        self._at_once = at_once

    def put(self, names: Sequence[str], payloads: Sequence[memoryview]) -> None:
        """Upload each payload as the object of its name."""
        for first in range(0, len(names), self._at_once):
            group = slice(first, first + self._at_once)
            paths = [f"{self._folder}/{name}" for name in names[group]]
            self._fs.pipe(dict(zip(paths, map(bytes, payloads[group]), strict=True)))

    def get(self, names: Sequence[str], buffers: Sequence[memoryview]) -> None:
        """Download the objects of `names` into `buffers`."""
        for first in range(0, len(names), self._at_once):
            group = slice(first, first + self._at_once)
            paths = [f"{self._folder}/{name}" for name in names[group]]
            if len(paths) == 1:
                buffers[first][:] = self._fs.cat_file(paths[0])
                continue
            found = self._fs.cat(paths)
            for path, buffer in zip(paths, buffers[group], strict=True):
                buffer[:] = found[path]


def our_store(server: S3Server, block_bytes: int, folder: str = "kvcommons") -> FsBlockStore:
    """Our store on `server`, for blocks of `block_bytes` (a multiple of 64)."""
    layout = BlockLayout(
        num_layers=1,
        kv_factor=1,
        num_kv_heads=1,
        tokens_per_block=TOKENS_PER_BLOCK,
        head_dim=block_bytes // TOKENS_PER_BLOCK // 2,
        dtype="bfloat16",
    )
    namespace = Namespace(model="benchmark", revision="1", engine="none", layout=layout)
    return open_store(f"s3://{server.bucket}/{folder}", namespace, server.options)


@dataclass(frozen=True)
class Round:
    """Seconds that one round took, by side and direction."""

    ours_put: float
    s3fs_put: float
    ours_get: float
    s3fs_get: float


@dataclass(frozen=True)
class Comparison:
    """The rounds of one comparison; each moved `num_bytes` four times."""

    server_kind: str
    num_bytes: int
    rounds: tuple[Round, ...]

    def median_gb_per_s(self, what: str) -> float:
        """The median speed of `ours_put`, `s3fs_put`, `ours_get` or `s3fs_get`."""
        taken_s = statistics.median(getattr(one, what) for one in self.rounds)
        return self.num_bytes / 1e9 / taken_s

    def ratios(self, direction: str) -> list[float]:
        """How many times as fast as s3fs we were at `put` or `get`, by round."""
        return [
            getattr(one, f"s3fs_{direction}") / getattr(one, f"ours_{direction}")
            for one in self.rounds
        ]


class Sides:
    """Both sides on one server, and the bytes that they move into the same slots."""

    def __init__(self, server: S3Server, block_bytes: int, num_blocks: int, at_once: int) -> None:
        random = np.random.default_rng(0)
        data = memoryview(random.integers(0, 256, block_bytes * num_blocks, np.uint8)).cast("B")
        self._payloads = _cut(data, block_bytes)
        self._pool = bytearray(block_bytes * num_blocks)
        slots = _cut(memoryview(self._pool), block_bytes)
        self._slots = [slots[index] for index in random.permutation(num_blocks)]
        self._rival = S3fsObjects(server, at_once)
        self._ours = our_store(server, block_bytes)

    def round(self, number: int) -> Round:
        """Put and get a chain of its own, because blocks that are stored are not written again."""
        tokens = range(number << 20, (number << 20) + len(self._slots) * TOKENS_PER_BLOCK)
        chain = BlockHashChain(TOKENS_PER_BLOCK, tokens=tokens)
        run = BlockRun(chain.parent_of(0), tuple(chain.hashes), tuple(self._payloads))
        names = [block_hash.hex() for block_hash in run.hashes]
        operations: list[tuple[str, Callable[[], object]]] = [
            ("ours_put", lambda: self._ours.write(run)),
            ("s3fs_put", lambda: self._rival.put(names, self._payloads)),
            ("ours_get", lambda: self._ours.read_into(run.hashes, self._slots)),
            ("s3fs_get", lambda: self._rival.get(names, self._slots)),
        ]
        if number % 2:  # who is first changes
            operations = [operations[index] for index in (1, 0, 3, 2)]
        return Round(**{what: self._timed(what, operation) for what, operation in operations})

    def _timed(self, what: str, operation: Callable[[], object]) -> float:
        if what.endswith("get"):
            self._pool[:] = bytes(len(self._pool))
        start_s = time.perf_counter()
        operation()
        taken_s = time.perf_counter() - start_s
        if what.endswith("get") and self._slots != self._payloads:
            raise RuntimeError(f"{what} returned other bytes than were put")
        return taken_s


def compare(block_bytes: int, num_blocks: int, num_rounds: int = 5, at_once: int = 8) -> Comparison:
    """Put and get the same blocks through both, in turn; the first round is not counted."""
    with running_s3_server() as server:
        sides = Sides(server, block_bytes, num_blocks, at_once)
        rounds = [sides.round(number) for number in range(num_rounds + 1)][1:]
    return Comparison(server.kind, block_bytes * num_blocks, tuple(rounds))


def _cut(data: memoryview, block_bytes: int) -> list[memoryview]:
    return [data[at : at + block_bytes] for at in range(0, data.nbytes, block_bytes)]


def main() -> None:
    """Print one comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=4.0, help="size of a block")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8, help="requests of s3fs in flight")
    given = parser.parse_args()
    found = compare(int(given.mib * (1 << 20)), given.blocks, given.rounds, given.at_once)
    for direction in ("put", "get"):
        ours, s3fs_ = (found.median_gb_per_s(f"{side}_{direction}") for side in ("ours", "s3fs"))
        ratios = found.ratios(direction)
        print(
            f"{found.server_kind} {direction}: ours {ours:.2f} GB/s, s3fs {s3fs_:.2f} GB/s, "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
