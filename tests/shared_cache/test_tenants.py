"""What one tenant wrote is never given to another one, whatever happens to the memory between."""

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from shared_cache.config import HostConfig
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostTier, NewRun
from shared_cache.host.local import LocalHostTier
from shared_cache.host.owner import rules_of
from tests.shared_cache.arenas import (
    BLOCK_BYTES,
    OwnerProcess,
    await_true,
    host_config,
    memory_folder,
    open_tier,
    owner_process,
)
from tests.shared_cache.fakes import chain_of

SALTS = ("", "red", "blue")
NUM_PROMPTS, BLOCKS_PER_PROMPT = 40, 8
NUM_TURNS = 600
NUM_SLOTS = (4 << 20) // BLOCK_BYTES
QUOTA_BLOCKS = 40


@pytest.fixture
def config() -> Iterator[HostConfig]:
    quota = QUOTA_BLOCKS * BLOCK_BYTES
    with memory_folder() as folder:
        yield host_config(folder, quotas={"red": quota, "blue": 2 * quota})


class Tenants:
    """Tenants that ask the same prompts; each has bytes of its own for them.

    The bytes are made from the tenant and the prompt, never from the block's name: a name that two
    tenants shared would show.
    """

    def __init__(self, seed: int) -> None:
        self._choose = random.Random(seed)
        self.num_hits = dict.fromkeys(SALTS, 0)

    def turn(self, tiers: list[HostTier]) -> None:
        """One tenant asks one prompt of one process: it checks what is here, brings the rest."""
        salt = self._choose.choice(SALTS)
        prompt = self._choose.randrange(NUM_PROMPTS)
        tier = self._choose.choice(tiers)
        scope = ReuseScope(cache_salt=salt)
        hashes = chain_of(BLOCKS_PER_PROMPT, 1000 * prompt, scope).hashes
        lease = tier.lease(hashes)
        for position, slot in enumerate(lease.slots):
            assert bytes(tier.buffer(slot)) == _bytes_of(salt, prompt, position)
        self.num_hits[salt] += len(lease.slots)
        tier.stored([hashes[position] for position in lease.to_store], True)
        self._bring(tier, scope, prompt, hashes)
        for position, slot in enumerate(lease.slots):
            assert bytes(tier.buffer(slot)) == _bytes_of(salt, prompt, position)
        tier.release(lease)

    def _bring(
        self, tier: HostTier, scope: ReuseScope, prompt: int, hashes: list[BlockHash]
    ) -> None:
        claim = tier.claim(hashes)
        start, new = len(claim.lease.slots), len(claim.slots)
        for position, slot in enumerate(claim.slots, start):
            tier.buffer(slot)[:] = _bytes_of(scope.cache_salt, prompt, position)
        parent = hashes[start - 1] if start else scope.root_hash()
        run = NewRun(parent, tuple(hashes[start : start + new]), scope.tenant)
        if self._choose.random() < 0.1:
            tier.cancel(claim.slots)  # written, and never promised
        else:
            tier.release(tier.commit(claim.slots, run))
        tier.release(claim.lease)


def _bytes_of(salt: str, prompt: int, position: int) -> bytes:
    return f"{salt:8}{prompt:4}{position:4}".encode() * (BLOCK_BYTES // 16)


def _assert_that_it_was_tight(tier: HostTier, tenants: Tenants) -> None:
    assert min(tenants.num_hits.values()) > 20, tenants.num_hits
    assert tier.stats().evicted_blocks > 100


def test_within_one_process(config: HostConfig) -> None:
    tenants = Tenants(1)
    tier = LocalHostTier(NUM_SLOTS * BLOCK_BYTES, BLOCK_BYTES, rules_of(config, "always"))
    for _ in range(NUM_TURNS):
        tenants.turn([tier])
    _assert_that_it_was_tight(tier, tenants)


def test_in_the_arena_of_a_node_whose_owner_is_killed(config: HostConfig) -> None:
    tenants = Tenants(2)
    with ExitStack() as stack:
        owner: OwnerProcess = stack.enter_context(owner_process(config))
        tiers: list[HostTier] = [stack.enter_context(open_tier(config)) for _ in range(2)]
        for turn in range(NUM_TURNS):
            if turn in (NUM_TURNS // 3, 2 * NUM_TURNS // 3):
                _assert_that_it_was_tight(tiers[0], tenants)
                owner.kill()
                owner.start()
                for tier in tiers:
                    await_true(lambda tier=tier: tier.stats().used_slots > 50)  # type: ignore[misc]
            tenants.turn(tiers)
        _assert_that_it_was_tight(tiers[0], tenants)
