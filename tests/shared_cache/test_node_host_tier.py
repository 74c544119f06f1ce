"""The node's host tier, as one process has it: counts, stock, damage, forks, and how it begins."""

import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared_cache.checksum import block_checksum
from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.hashing import ReuseScope
from shared_cache.host import protocol as wire
from shared_cache.host import starting
from shared_cache.host.__main__ import _parser
from shared_cache.host.connection import OwnerLink
from shared_cache.host.folder import is_locked
from shared_cache.host.holdings import GROWN_FOR_S, Holdings, Stock
from shared_cache.host.interface import NewRun, Retention
from shared_cache.host.journal import EventKind
from shared_cache.host.node import NodeHostTier, open_node_tier
from shared_cache.host.starting import parse_quotas
from tests.shared_cache.arenas import (
    BLOCK_BYTES,
    ROOT,
    await_true,
    background_owners,
    bring,
    hashes_of,
    host_config,
    is_right,
    memory_folder,
    open_tier,
    paths_of,
    payload_of,
    running_owner,
)
from tests.shared_cache.fakes import FakeClock

HASHES = hashes_of("tier", 12)
STOCK = 32  # an eighth of the 256 slots


@pytest.fixture
def config() -> Iterator[HostConfig]:
    """The settings of an arena whose owner runs."""
    with memory_folder() as folder, running_owner(host_config(folder)):
        yield host_config(folder)


@pytest.fixture
def tier(config: HostConfig) -> Iterator[NodeHostTier]:
    with open_tier(config) as tier:
        yield tier


@pytest.fixture
def peer(config: HostConfig) -> Iterator[NodeHostTier]:
    """Another process's view of the same arena, as far as the owner can tell."""
    with open_tier(config) as tier:
        yield tier


def _counts(tier: NodeHostTier) -> tuple[int, int, int]:
    """Reserved, used and leased slots; all slots are accounted for."""
    stats = tier.stats()
    assert stats.is_connected
    assert stats.free_slots + stats.used_slots + stats.reserved_slots == stats.num_slots
    return stats.reserved_slots, stats.used_slots, stats.leased_slots


# Blocks and leases


def test_blocks_of_one_process_are_read_by_another(tier: NodeHostTier, peer: NodeHostTier) -> None:
    lease = bring(tier, HASHES)
    assert len(lease.slots) == 12
    theirs = peer.lease(HASHES, 2)
    assert theirs.slots == lease.slots[2:]
    assert theirs.num_from_peers == 10
    for block_hash, slot in zip(HASHES[2:], theirs.slots, strict=True):
        assert is_right(peer, block_hash, slot)
        assert peer.checksum(slot) == block_checksum(block_hash, peer.buffer(slot))
    assert peer.buffer(theirs.slots[0]).nbytes == BLOCK_BYTES


def test_a_block_is_leased_until_its_last_lease_here_ends(
    tier: NodeHostTier, peer: NodeHostTier
) -> None:
    first = bring(tier, HASHES[:4])
    second = tier.lease(HASHES[:2])
    third = tier.lease_held(HASHES)
    assert third.slots == first.slots
    tier.release(first)
    tier.release(second)
    tier.release(second)
    assert _counts(tier)[2] == 4
    tier.release(third)
    assert _counts(tier)[2] == 0
    assert tier.lease_held(HASHES).slots == ()


def test_releasing_and_leasing_what_is_held_asks_nobody(
    tier: NodeHostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = bring(tier, HASHES[:4])
    link = tier._session.link
    assert link is not None
    monkeypatch.setattr(link, "ask", None)
    again = tier.lease_held(HASHES[:4])
    slots = tier.reserve(2)
    assert len(slots) == 2
    assert tier.checksum(again.slots[0]) == block_checksum(HASHES[0], tier.buffer(again.slots[0]))
    tier.release(again)
    tier.cancel(slots)
    monkeypatch.undo()
    assert _counts(tier)[2] == 4
    tier.release(lease)


def test_a_block_that_two_processes_bring_is_kept_once(
    tier: NodeHostTier, peer: NodeHostTier
) -> None:
    leases = []
    for one in (tier, peer):
        slots = one.reserve(2)
        for block_hash, slot in zip(HASHES, slots, strict=False):
            one.buffer(slot)[:] = payload_of(block_hash)
        leases.append(one.commit(slots, NewRun(ROOT, tuple(HASHES[:2]))))
    assert leases[0].slots == leases[1].slots
    assert leases[1].num_from_peers == 2
    assert _counts(tier)[1:] == (2, 2)


def test_each_block_is_claimed_by_one_process(tier: NodeHostTier, peer: NodeHostTier) -> None:
    claim = tier.claim(HASHES)
    assert len(claim.slots) == 12
    theirs = peer.claim(HASHES)
    assert (theirs.slots, theirs.lease.slots, theirs.is_coming) == ((), (), True)
    done = threading.Event()

    def commit_soon() -> None:
        done.wait(5)
        tier.commit(claim.slots, NewRun(ROOT, tuple(HASHES)))

    thread = threading.Thread(target=commit_soon)
    thread.start()
    done.set()
    waited = peer.claim(HASHES, wait_s=10)
    thread.join()
    assert len(waited.lease.slots) == 12


def test_the_duty_to_store_is_given_once_and_again_when_it_is_declined(
    tier: NodeHostTier, peer: NodeHostTier
) -> None:
    claim = tier.claim(HASHES[:4])
    lease = tier.commit(claim.slots, NewRun(ROOT, tuple(HASHES[:4])))
    assert lease.to_store == (0, 1, 2, 3)
    tier.stored(HASHES[:2], is_stored=True)
    tier.stored(HASHES[2:4], is_stored=False)
    tier.stats()  # requests follow notices, so the owner has heard them now
    assert peer.lease(HASHES[:4]).to_store == (2, 3)
    assert peer.events() is not None


def test_events_tell_what_came_went_and_was_stored(tier: NodeHostTier) -> None:
    before = tier.events()
    assert before is not None
    bring(tier, HASHES[:2])
    tier.stored(HASHES[:1], is_stored=True)
    told = tier.events(before.next)
    assert told is not None
    assert told.events == (
        (EventKind.BROUGHT, HASHES[0]),
        (EventKind.BROUGHT, HASHES[1]),
        (EventKind.STORED, HASHES[0]),
    )
    assert told.first == before.next


def test_what_any_process_uses_is_in_use(
    tier: NodeHostTier, peer: NodeHostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_cache.host.questions.HASHES_ASKED_AT_ONCE", 2)
    assert peer.in_use(HASHES) == frozenset()
    bring(tier, HASHES[:3])
    assert peer.in_use(HASHES) == frozenset(HASHES[:3])
    assert peer.in_use([]) == frozenset()


def test_pinned_blocks_outlive_unpinned_ones(tier: NodeHostTier) -> None:
    tier.release(bring(tier, HASHES[:2]))
    assert tier.pin(HASHES, 60.0) == 2
    for part in range(4):
        tier.release(bring(tier, hashes_of(f"more {part}", 100)))
    assert len(tier.lease(HASHES).slots) == 2
    assert tier.stats().evicted_blocks > 0


def test_an_arena_smaller_than_a_prefix_holds_its_beginning(tier: NodeHostTier) -> None:
    hashes = hashes_of("long", 400)
    claim = tier.claim(hashes)
    assert len(claim.slots) == 256 - STOCK
    lease = tier.commit(claim.slots, NewRun(ROOT, tuple(hashes[: len(claim.slots)])))
    assert len(lease.slots) == 256 - STOCK
    assert tier.claim(hashes[len(claim.slots) :]).slots == ()
    assert tier.lease(hashes).slots == lease.slots


def test_retention_and_tenant_reach_the_owner() -> None:
    scope = ReuseScope(cache_salt="acme")
    with memory_folder() as folder:
        config = host_config(folder, quotas={"acme": 2 * BLOCK_BYTES})
        with running_owner(config), open_tier(config) as tier:
            claim = tier.claim(HASHES[:4])
            run = NewRun(ROOT, tuple(HASHES[:4]), scope.tenant, retention=Retention(90, 5.0))
            assert len(tier.commit(claim.slots, run).slots) == 2
            assert _counts(tier) == (STOCK, 2, 2)


# Misuse


def test_misuse_is_an_error_and_changes_nothing(tier: NodeHostTier) -> None:
    run = NewRun(ROOT, tuple(HASHES[:1]))
    slots = tier.reserve(2)
    for wrong, text in [
        ((10**6,), "not reserved"),
        (slots, "2 slots, 1 hashes"),
        ((), "0 slots, 1 hashes"),
    ]:
        with pytest.raises(ValueError, match=text):
            tier.commit(wrong, run)
    with pytest.raises(ValueError, match="named twice"):
        tier.commit((slots[0], slots[0]), NewRun(ROOT, tuple(HASHES[:2])))
    with pytest.raises(ValueError, match="not reserved"):
        tier.cancel((10**6,))
    tier.commit(slots[:1], run)
    with pytest.raises(ValueError, match="not reserved"):
        tier.commit(slots[:1], run)
    tier.cancel(slots[1:])
    with pytest.raises(ValueError, match="not one of"):
        tier.buffer(10**6)
    await_true(lambda: _counts(tier) == (STOCK - 2, 1, 1))


def test_nothing_asked_gives_nothing(tier: NodeHostTier) -> None:
    assert tier.lease([]).slots == ()
    assert tier.claim([]).slots == ()
    assert tier.reserve(0) == ()
    assert tier.commit((), NewRun(ROOT, ())).slots == ()
    assert tier.pin([], 1.0) == 0


# The stock


def test_the_stock_is_there_at_once_and_is_filled_again(tier: NodeHostTier) -> None:
    slots = tier.reserve(20)
    assert len(slots) == 20
    await_true(lambda: _counts(tier)[0] == 20 + STOCK)
    tier.cancel(slots)
    await_true(lambda: _counts(tier)[0] == STOCK)


def test_more_than_the_stock_gives_what_is_there(tier: NodeHostTier) -> None:
    assert len(tier.reserve(1000)) == STOCK
    tier.lease([])


def test_a_stock_that_ran_short_grows_for_a_while() -> None:
    clock = FakeClock()
    stock = Stock(8, clock)
    stock.limit(24)
    assert stock.ask() == 8
    assert stock.ask() == 0, "it has asked already"
    stock.add(range(8))
    assert stock.take(6) == (2, 3, 4, 5, 6, 7)
    assert stock.take(9) == (0, 1)
    assert stock.ask() == 16
    stock.add(range(16))
    stock.take(17)
    assert stock.ask() == 24, "never more than the limit"
    stock.add(range(24))
    assert stock.surplus() == []
    clock.now_s += GROWN_FOR_S + 1
    assert stock.surplus() == list(range(8, 24))
    assert stock.take(3) == (5, 6, 7)


def test_a_stock_in_a_tiny_arena_has_one_slot() -> None:
    stock = Stock(64, FakeClock())
    stock.limit(0)
    assert stock.ask() == 1


def test_holdings_of_a_lost_block_stay_readable_and_are_cancelled_at_the_end() -> None:
    holdings = Holdings()
    lease = holdings.grant(HASHES[:3], (0, 4, 8))
    assert holdings.listing() == ([0, 4, 8], [], HASHES[:3])
    assert holdings.lost([4, 12]) == [12]
    assert holdings.lease_again(HASHES[:3])[1] == (0,)
    assert holdings.listing() == ([0, 8], [4], [HASHES[0], HASHES[2]])
    holdings.refused([8])
    assert holdings.uses(8, 9)
    assert holdings.release(lease) == ([], [4])
    assert not holdings.uses(8, 9)


def test_a_block_that_was_told_to_a_new_owner_is_leased_there_once() -> None:
    holdings = Holdings()
    leases = [holdings.grant(HASHES[:1], (4,)) for _ in range(3)]
    assert holdings.listing() == ([4], [], HASHES[:1])
    leases.append(holdings.grant(HASHES[:1], (4,)))
    assert [holdings.release(lease) for lease in leases] == [([], [])] * 3 + [([4, 4], [])]


# Damage


def test_a_damaged_block_is_found_when_every_load_is_verified(config: HostConfig) -> None:
    config = config.model_copy(update={"verify_every_load": True})
    with open_tier(config) as tier:
        lease = bring(tier, HASHES[:4])
        tier.buffer(lease.slots[2])[77] ^= 1
        tier.release(lease)
        short = tier.lease(HASHES[:4])
        assert short.slots == lease.slots[:2]
        assert _counts(tier)[1:] == (3, 2), "the damaged block is forgotten"
        again = bring(tier, HASHES[:4])
        assert all(is_right(tier, *pair) for pair in zip(HASHES, again.slots, strict=False))
        assert len(again.slots) == 4


def test_blocks_that_nobody_leases_can_be_dropped(tier: NodeHostTier) -> None:
    tier.release(bring(tier, HASHES[:4]))
    held = tier.lease(HASHES[:1])
    assert tier.drop(HASHES[:2]) == 1
    assert tier.lease(HASHES).slots == held.slots


def test_a_claim_ends_before_a_damaged_block(config: HostConfig) -> None:
    config = config.model_copy(update={"verify_every_load": True})
    with open_tier(config) as tier:
        lease = bring(tier, HASHES[:4])
        tier.buffer(lease.slots[1])[0] ^= 1
        tier.release(lease)
        claim = tier.claim(HASHES[:6])
        assert len(claim.lease.slots) == 1
        assert claim.slots == ()
        await_true(lambda: _counts(tier) == (STOCK, 3, 1))


# Extents


def test_memory_is_shown_once_and_before_its_slots_are_given_out(tier: NodeHostTier) -> None:
    seen: list[int] = []
    tier.show_memory(lambda memory: seen.append(memory.nbytes))
    assert seen == [2 << 20], "that of the stock"
    tier.release(bring(tier, hashes_of("many", 200)))
    assert seen == [2 << 20] * 2
    bring(tier, hashes_of("more", 200))
    assert seen == [2 << 20] * 2


def test_all_memory_is_shown_at_once_where_it_is_populated(config: HostConfig) -> None:
    with open_tier(config.model_copy(update={"populate": True})) as whole:
        seen: list[int] = []
        whole.show_memory(lambda memory: seen.append(memory.nbytes))
        assert sum(seen) >= whole.num_slots * whole.block_bytes
        num_shown = len(seen)
        whole.release(bring(whole, hashes_of("many", 200)))
        assert len(seen) == num_shown


def test_a_hook_that_fails_is_counted_and_does_no_harm(tier: NodeHostTier) -> None:
    def refuse(_: memoryview) -> None:
        raise RuntimeError("no device")

    tier.show_memory(refuse)
    assert len(bring(tier, HASHES).slots) == 12
    assert tier.num_faults == 1


# Begin and end


def test_closing_gives_everything_back(config: HostConfig, peer: NodeHostTier) -> None:
    with open_tier(config) as tier:
        bring(tier, HASHES)
        tier.reserve(3)
        tier.claim(hashes_of("claimed", 3))
        tier.close()
        assert tier.lease(HASHES).slots == ()
        assert tier.reserve(1) == ()
        assert not tier.stats().is_connected
    await_true(lambda: _counts(peer) == (STOCK, 12, 0))
    assert list(paths_of(config).clients.iterdir()) != []
    peer.close()
    assert list(paths_of(config).clients.iterdir()) == []


def test_a_forked_child_neither_has_nor_keeps_its_parents_leases(
    config: HostConfig, peer: NodeHostTier
) -> None:
    told, tell = os.pipe()
    asked, ask = os.pipe()
    parent = os.fork()
    if parent == 0:  # a process of its own, so that it can be killed while its child lives on
        os.setsid()
        with open_tier(config) as tier:
            bring(tier, HASHES)
            if os.fork() == 0:
                os.write(tell, b"child")
                os.read(asked, 1)
                state = tier.lease_held(HASHES).slots, tier.lease(HASHES).slots, tier.reserve(1)
                os.write(tell, b"right" if state == ((), (), ()) else b"wrong")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(told, 5) == b"child"
        assert _counts(peer)[2] == 12
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        await_true(lambda: _counts(peer) == (STOCK, 12, 0))
        os.write(ask, b"!")
        assert os.read(told, 5) == b"right"
    finally:
        os.killpg(parent, signal.SIGKILL)
        for pipe in (told, tell, asked, ask):
            os.close(pipe)


def test_one_owner_is_started_for_many_that_begin_at_once() -> None:
    with (
        memory_folder() as folder,
        background_owners(host_config(folder, start_owner=True, quotas={"salt": 1 << 20})) as (
            config,
            owners,
        ),
    ):
        with ThreadPoolExecutor(3) as pool:
            opened = [pool.submit(open_node_tier, config, "one", BLOCK_BYTES) for _ in range(3)]
            tiers = [one.result(20) for one in opened]
        await_true(lambda: 0 < _counts(tiers[0])[0] <= STOCK)
        (owner,) = owners()
        assert len(bring(tiers[0], HASHES).slots) == 12
        assert len(tiers[1].lease(HASHES).slots) == 12
        for tier in tiers:
            tier.close()
        os.kill(owner, signal.SIGTERM)
        await_true(lambda: not any(folder.iterdir()))


def test_without_an_owner_the_error_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "START_TIMEOUT_S", 0.1)
    with (
        memory_folder() as folder,
        pytest.raises(ConfigError, match=r"python -m shared_cache\.host --name default"),
        open_tier(host_config(folder)),
    ):
        pass


def test_an_owner_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory_folder() as folder:
        config = host_config(folder, start_owner=True, bytes=1 << 50)
        with (
            pytest.raises(ConfigError, match=r"did not start.*cache\.host\.bytes"),
            open_tier(config),
        ):
            pass
        assert not is_locked(paths_of(config).lock)


def test_a_block_too_large_for_the_arena_is_an_error_at_the_start(config: HostConfig) -> None:
    with (
        pytest.raises(ConfigError, match=r"cache\.host\.bytes"),
        open_tier(config, block_bytes=9 << 20),
    ):
        pass


def test_the_running_owners_size_counts_and_the_difference_is_logged(
    config: HostConfig, caplog: pytest.LogCaptureFixture
) -> None:
    other = config.model_copy(update={"bytes": 64 << 20})
    with caplog.at_level(logging.WARNING), open_tier(other, admission="never") as tier:
        assert tier.num_slots == 256
    (record,) = caplog.records
    assert "4 MiB and admission always" in record.getMessage()
    assert "64 MiB and never" in record.getMessage()


def test_quotas_travel_by_tenant_and_never_by_salt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = host_config(tmp_path, quotas={"a secret": 123})
    arguments = starting._arguments(paths_of(config), config, "always")
    assert not any("secret" in argument for argument in arguments)
    quotas = [text.partition("=")[2] for text in arguments if text.startswith("--quota=")]
    assert parse_quotas(quotas) == {ReuseScope("a secret").tenant: 123}
    with pytest.raises(ValueError, match="hex"):
        parse_quotas(["secret=1"])


@pytest.mark.parametrize("populate", [False, True])
def test_whether_all_memory_is_taken_at_start_travels(populate: bool, tmp_path: Path) -> None:
    config = host_config(tmp_path, populate=populate)
    arguments = starting._arguments(paths_of(config), config, "always")
    assert _parser().parse_args(arguments).populate is populate


def test_no_process_is_left_behind_by_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("owner", 10)

    monkeypatch.setattr(starting.subprocess, "run", hang)
    with memory_folder() as folder:
        config = host_config(folder, start_owner=True)
        with pytest.raises(ConfigError, match="did not start"), open_tier(config):
            pass
        assert not paths_of(config).starter.exists()


def test_what_was_told_before_the_answer_is_forgotten_if_it_is_another_arena() -> None:
    """A slot that is cancelled must not be taken for one of the next arena."""
    ours, theirs = socket.socketpair()
    link = OwnerLink(ours, lambda _: None)
    link.tell(wire.Notice(cancelled=[4]))
    link.forget_notices()
    link.tell(wire.Notice(cancelled=[8]))
    link.start()
    (frame,) = wire.FrameReader().feed(theirs.recv(1 << 16))
    link.end()
    theirs.close()
    assert wire.client_decoder.decode(frame) == wire.Notice(cancelled=[8])
