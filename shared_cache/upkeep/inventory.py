"""What a store holds, in figures: for whoever asks whether it is worth its disk.

Pure: it is given what listing told. Two figures show waste. Blocks stored more than once come from
writers that began a run at different blocks: harmless, but they take room. Runs whose beginning was
deleted can be found by no prompt; but the hash of a scope's root looks like any other, so they
cannot be told from the chains of a cache salt or an adapter, and are counted together with those.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared_cache.hashing import DEFAULT_SCOPE
from shared_cache.stores.store import StoredRun


@dataclass(frozen=True, slots=True)
class Inventory:
    """Totals of some stored runs of one namespace.

    `num_duplicates` blocks are stored once more than needed. `num_unrooted` runs begin behind a
    block that is not stored, and that is not the root of requests without salt and adapter.
    `used_first_s` and `used_last_s` are None where the medium tells no time. `run_lengths` counts
    runs by length in blocks, in powers of two: key 8 stands for 5 to 8 blocks.
    """

    num_runs: int
    num_blocks: int
    num_bytes: int
    num_duplicates: int
    num_unrooted: int
    used_first_s: float | None
    used_last_s: float | None
    run_lengths: Mapping[int, int]


def take_inventory(runs: Iterable[StoredRun]) -> Inventory:
    """The totals of `runs`, all of one namespace."""
    runs = list(runs)
    stored = {block_hash for run in runs for block_hash in run.hashes}
    num_blocks = sum(len(run.hashes) for run in runs)
    known_parents = stored | {DEFAULT_SCOPE.root_hash()}
    times_s = [run.used_s for run in runs if run.used_s > 0]
    lengths = Counter(1 << (len(run.hashes) - 1).bit_length() for run in runs)
    return Inventory(
        num_runs=len(runs),
        num_blocks=num_blocks,
        num_bytes=sum(run.num_bytes for run in runs),
        num_duplicates=num_blocks - len(stored),
        num_unrooted=sum(run.parent not in known_parents for run in runs),
        used_first_s=min(times_s, default=None),
        used_last_s=max(times_s, default=None),
        run_lengths=dict(sorted(lengths.items())),
    )
