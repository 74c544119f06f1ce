"""Clients of an arena to be killed, stopped and let run: `python -m ... TASK FOLDER NAME SEED`.

They report in lines of JSON and end when their standard input is closed.
"""

import json
import random
import select
import sys
import time
from collections import Counter, deque
from pathlib import Path

from shared_cache.checksum import block_checksum
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, NewRun
from shared_cache.host.node import NodeHostTier
from shared_cache.readers.memory import outside_buffers
from tests.shared_cache.arenas import (
    ROOT,
    hashes_of,
    host_config,
    is_right,
    open_tier,
    payload_of,
)

NUM_CHAINS, BLOCKS_PER_CHAIN = 48, 8
MAX_HELD = 6


def _say(**numbers: int) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def _is_told_to_end() -> bool:
    return bool(select.select((sys.stdin,), (), (), 0)[0])


def hold(tier: NodeHostTier, seed: int) -> None:
    """Lease 8 blocks, reserve 5 slots and claim 3, then do nothing."""
    hashes = hashes_of(f"held {seed}", 8)
    claim = tier.claim(hashes)
    for block_hash, slot in zip(hashes, claim.slots, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash)
    lease = tier.commit(claim.slots, NewRun(ROOT, tuple(hashes)))
    reserved = tier.reserve(5)
    claimed = tier.claim(hashes_of(f"claimed {seed}", 3)).slots
    _say(leased=len(lease.slots), reserved=len(reserved), claimed=len(claimed))
    sys.stdin.read()
    num_right = sum(is_right(tier, *pair) for pair in zip(hashes, lease.slots, strict=True))
    tier.release(lease)
    _say(right=num_right)


def hold_with_reader(tier: NodeHostTier, seed: int) -> None:
    """Lease 8 blocks, and have a reader process, which is told."""
    hashes = hashes_of(f"held {seed}", 8)
    lease = tier.commit(tier.claim(hashes).slots, NewRun(ROOT, tuple(hashes)))
    reader = tier._session._reader
    while outside_buffers([tier.buffer(slot) for slot in lease.slots]) is None:
        time.sleep(0.01)
    assert reader._process is not None
    _say(leased=len(lease.slots), reader=reader._process.pid)
    sys.stdin.read()


def churn(tier: NodeHostTier, seed: int) -> None:
    """Bring, lease, hold and read blocks without end; a block with wrong bytes is counted."""
    choose = random.Random(seed)
    chains = [hashes_of(f"chain {number}", BLOCKS_PER_CHAIN) for number in range(NUM_CHAINS)]
    held: deque[tuple[list[BlockHash], HostLease]] = deque()
    seen: Counter[str] = Counter(wrong=0, hits=0, brought=0, turns=0)
    _say(started=1)
    while not _is_told_to_end():
        hashes = choose.choice(chains)
        seen["turns"] += 1
        lease = tier.lease(hashes)
        seen["hits"] += len(lease.slots)
        for block_hash, slot in zip(hashes, lease.slots, strict=False):
            good = tier.checksum(slot) == block_checksum(block_hash, tier.buffer(slot))
            seen["wrong"] += not (good and is_right(tier, block_hash, slot))
        held.append((list(hashes), lease))
        if len(lease.slots) < len(hashes):
            seen["brought"] += _bring(tier, hashes, choose)
        while len(held) > choose.randrange(MAX_HELD):
            names, lease = held.popleft()
            for name, slot in zip(names, lease.slots, strict=False):
                seen["wrong"] += not is_right(tier, name, slot)
            tier.release(lease)
    for _, lease in held:
        tier.release(lease)
    _say(**seen)


def _bring(tier: NodeHostTier, hashes: list[BlockHash], choose: random.Random) -> int:
    claim = tier.claim(hashes, wait_s=choose.choice((0.0, 0.02)))
    start, num_new = len(claim.lease.slots), len(claim.slots)
    new = tuple(hashes[start : start + num_new])
    for block_hash, slot in zip(new, claim.slots, strict=True):
        tier.buffer(slot)[:] = payload_of(block_hash)
    tier.release(claim.lease)
    if not num_new:
        return 0
    if choose.random() < 0.1:
        tier.cancel(claim.slots)
        return 0
    parent = hashes[start - 1] if start else ROOT
    lease = tier.commit(claim.slots, NewRun(parent, new))
    tier.release(lease)
    return len(lease.slots)


if __name__ == "__main__":
    task, folder, name, seed = sys.argv[1:]
    tasks = {"hold": hold, "hold_with_reader": hold_with_reader, "churn": churn}
    with open_tier(host_config(Path(folder), name=name, reader_threads=1)) as tier:
        tasks[task](tier, int(seed))
