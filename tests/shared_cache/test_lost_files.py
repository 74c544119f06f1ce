"""Files of a running arena that somebody removes, and messages of clients that say wrong things.

No living process may be taken for dead while it can be known better, and nobody's mistake may
reach another client.
"""

import logging
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared_cache.checksum import block_checksum
from shared_cache.config import HostConfig
from shared_cache.host import adoption, roster
from shared_cache.host import protocol as wire
from shared_cache.host.folder import ClientFile, is_locked, remove_if_unlocked
from shared_cache.host.protocol import pack_hashes
from shared_cache.host.terms import MAX_TTL_S, checked_ttl_s
from tests.shared_cache.arenas import (
    BLOCK_BYTES,
    ROOT,
    OwnerProcess,
    OwnerThread,
    RawClient,
    await_true,
    bring,
    can_connect,
    hashes_of,
    host_config,
    is_right,
    memory_folder,
    open_tier,
    owner_process,
    paths_of,
    running_owner,
)

HASHES = hashes_of("lost files", 8)


@pytest.fixture
def config() -> Iterator[HostConfig]:
    with memory_folder() as folder:
        yield host_config(folder)


@pytest.fixture
def killed(config: HostConfig) -> Iterator[tuple[OwnerProcess, RawClient, dict[str, Any]]]:
    """An owner that was killed, a living client of it, and what that has: 4 blocks, 2 slots."""
    with owner_process(config) as owner:
        client = RawClient(config, is_alive=True)
        boot = client.attach().boot
        claimed = client.ask(wire.Claim(1, pack_hashes(HASHES[:4]), 0.0))
        with paths_of(config).arena.open("r+b") as arena:
            for slot in claimed.reserved:
                arena.seek(slot * 4096)
                arena.write(bytes(BLOCK_BYTES))
        sums = [block_checksum(name, memoryview(bytes(BLOCK_BYTES))) for name in HASHES[:4]]
        packed = pack_hashes(HASHES[:4]), struct.pack("<4Q", *sums)
        commit = wire.Commit(2, claimed.reserved, ROOT, *packed, b"", False, 35, None)
        leased = client.ask(commit).slots
        reserved = client.ask(wire.Reserve(3, 2)).slots
        owner.kill()
        held = {"boot": boot, "leased": leased, "reserved": reserved}
        yield owner, client, {**held, "hashes": pack_hashes(HASHES[:4])}
        client.close()


def _counts(config: HostConfig) -> tuple[int, int]:
    """Reserved and leased slots."""
    client = RawClient(config, 99)
    client.attach()
    stats = client.ask(wire.GetStats(1)).stats
    client.close()
    return stats.reserved_slots, stats.leased_slots


# Removed files


@pytest.mark.parametrize("removed", ["lock", "socket"])
def test_an_owner_whose_files_were_removed_ends_and_all_begin_afresh(
    config: HostConfig, removed: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = OwnerThread(config)
    with open_tier(config) as tier:
        lease = bring(tier, HASHES)
        getattr(paths_of(config), removed).unlink()
        first.run(first.owner.wait_stopped())
        assert any(record.levelno == logging.ERROR for record in caplog.records)
        with running_owner(config):
            await_true(lambda: tier.stats().is_connected)
            assert [is_right(tier, *pair) for pair in zip(HASHES, lease.slots, strict=True)]
    first.close()


def test_the_arena_of_an_owner_that_lost_its_lock_is_not_adopted(config: HostConfig) -> None:
    with owner_process(config) as first:
        boot = RawClient(config)
        before = boot.attach().boot
        boot.close()
        first.pause()
        paths_of(config).lock.unlink()
        with running_owner(config):
            client = RawClient(config)
            assert client.attach().boot != before
            client.close()


def test_a_client_whose_file_was_removed_is_not_taken_for_dead(config: HostConfig) -> None:
    with running_owner(config):
        client = RawClient(config, is_alive=True)
        client.attach()
        client.ask(wire.Claim(1, pack_hashes(HASHES), 0.0))
        paths_of(config).client(client.holder).unlink()
        client.socket.close()
        time.sleep(0.2)
        assert _counts(config)[0] == 8
        client.close()
        await_true(lambda: _counts(config)[0] == 0)


def test_a_client_makes_its_file_anew(config: HostConfig) -> None:
    with running_owner(config), open_tier(config) as tier:
        lease = bring(tier, HASHES)
        shutil.rmtree(paths_of(config).clients)
        await_true(paths_of(config).clients.is_dir)
        await_true(lambda: any(map(is_locked, paths_of(config).clients.iterdir())))
        assert tier.lease(HASHES).slots == lease.slots


def test_a_client_that_came_back_too_late_is_refused_what_it_had(config: HostConfig) -> None:
    with running_owner(config):
        client = RawClient(config)
        boot = client.attach().boot
        slots = client.ask(wire.Claim(1, pack_hashes(HASHES[:2]), 0.0)).reserved
        client.close()
        await_true(lambda: _counts(config)[0] == 0)
        other = RawClient(config, 8)
        other.attach()
        others = other.ask(wire.Claim(1, pack_hashes(HASHES[:2]), 0.0)).reserved
        assert set(others) == set(slots)
        late = RawClient(config)
        held = {"leased": slots[:1], "reserved": slots[1:], "hashes": HASHES[0]}
        welcome = late.attach(boot=boot, **held)
        assert sorted(welcome.refused) == sorted(slots)
        assert _counts(config) == (2, 0)
        late.close()
        other.close()


def test_a_leased_slot_that_holds_another_block_is_refused(
    config: HostConfig, killed: tuple[OwnerProcess, RawClient, dict[str, Any]]
) -> None:
    owner, _, held = killed
    owner.start()
    again = RawClient(config)
    welcome = again.attach(**{**held, "hashes": pack_hashes(HASHES[4:])})
    assert sorted(welcome.refused) == sorted(held["leased"])
    assert welcome.lost == []
    assert again.ask(wire.GetStats(1)).stats.leased_slots == 0
    again.close()


def test_a_client_file_is_removed_only_when_nobody_has_locked_it(tmp_path: Path) -> None:
    path = tmp_path / "client"
    file = ClientFile(path)
    file.keep()
    assert not remove_if_unlocked(path)
    assert path.exists()
    path.unlink()
    file.keep()
    assert is_locked(path)
    file.leave()
    assert not path.exists()
    with pytest.raises(ConnectionAbortedError):
        file.keep()
    assert not path.exists(), "a session that was closed is not kept alive"
    path.touch()
    assert remove_if_unlocked(path)
    assert not path.exists()


def test_even_the_block_itself_is_refused_to_a_client_whose_end_was_noticed(
    config: HostConfig,
) -> None:
    with running_owner(config):
        client = RawClient(config)
        boot = client.attach().boot
        slots = client.ask(wire.Claim(1, HASHES[0], 0.0)).reserved
        commit = wire.Commit(2, slots, ROOT, HASHES[0], bytes(8), b"", False, 35, None)
        assert client.ask(commit).slots == slots
        client.close()
        await_true(lambda: _counts(config) == (0, 0))
        late = RawClient(config)
        assert late.attach(boot=boot, leased=slots, hashes=HASHES[0]).refused == slots
        assert _counts(config) == (0, 0)
        late.close()


# Wrong messages


def test_one_malformed_attach_does_not_keep_others_from_adoption(
    config: HostConfig, killed: tuple[OwnerProcess, RawClient, dict[str, Any]]
) -> None:
    owner, client, held = killed
    owner.start()
    bad = RawClient(config)
    bad.attach(**{**held, "reserved": held["reserved"] * 2, "hashes": b""})
    assert bad.answer() is None, "leased slots without their hashes"
    bad.close()
    good = RawClient(config)
    welcome = good.attach(**{**held, "reserved": held["reserved"] * 2})
    assert isinstance(welcome, wire.Welcome)
    assert (welcome.lost, welcome.refused) == ([], [])
    assert good.ask(wire.GetStats(1)).stats.leased_slots == 4
    assert good.ask(wire.GetStats(1)).stats.reserved_slots >= 2
    client.close()
    good.close()
    await_true(lambda: _counts(config) == (0, 0))


def test_an_error_in_taking_back_ends_that_client_only(
    config: HostConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_owner(config):
        good, bad = RawClient(config, 1), RawClient(config, 2)
        good.attach()

        def fail(*_: object) -> None:
            raise KeyError("unforeseen")

        with monkeypatch.context() as patch:
            patch.setattr(roster.Roster, "_take_back", fail)
            assert bad.attach() is None
        assert good.ask(wire.GetStats(1)).stats.num_slots == 256
        good.close()
        bad.close()


def test_a_refused_namespace_leaves_no_hole_in_the_records(config: HostConfig) -> None:
    with owner_process(config) as owner:
        refused = RawClient(config, 1)
        assert isinstance(refused.attach("x" * 200), wire.Refused)
        refused.close()
        with open_tier(config) as tier:
            tier.release(bring(tier, HASHES))
            owner.kill()
            owner.start()
            await_true(lambda: tier.stats().is_connected)
            await_true(lambda: len(tier.lease(HASHES).slots) == 8)


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), -1.0])
def test_an_endless_or_negative_time_ends_its_senders_connection(
    config: HostConfig, ttl_s: float
) -> None:
    with running_owner(config):
        for message in (
            wire.Pin(1, pack_hashes(HASHES), ttl_s),
            wire.Commit(2, [], ROOT, b"", b"", b"", False, 35, ttl_s),
        ):
            client = RawClient(config)
            client.attach()
            assert client.ask(message) is None
            client.close()
        with open_tier(config) as tier, pytest.raises(ValueError, match="0 s or more"):
            tier.pin(HASHES, ttl_s)


def test_times_have_a_longest_one() -> None:
    assert checked_ttl_s(1e300) == MAX_TTL_S
    assert checked_ttl_s(None) is None


# Waiting, and going on


def test_the_owner_says_for_whom_the_adopted_blocks_wait(
    config: HostConfig,
    killed: tuple[OwnerProcess, RawClient, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, client, _ = killed
    assert client.file is not None
    client.file.note("4711")
    monkeypatch.setattr(adoption, "LOG_WAITING_S", 0.02)
    with running_owner(config):
        await_true(lambda: caplog.text.count(f"process 4711 (client {client.holder:016x})") > 1)


def test_the_session_goes_on_after_an_unforeseen_error(
    config: HostConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owner_process(config) as owner, open_tier(config) as tier:
        failed = []

        def fail(session: object) -> bool:
            failed.append(session)
            raise RuntimeError("unforeseen")

        with monkeypatch.context() as patch:
            patch.setattr("shared_cache.host.session.OwnerSession._try_to_attach", fail)
            owner.kill()
            await_true(lambda: len(failed) > 1)
            assert tier.num_faults > 0
        owner.start()
        await_true(lambda: tier.stats().is_connected)


def test_an_answer_over_a_former_link_does_not_fill_the_stock(config: HostConfig) -> None:
    with running_owner(config), open_tier(config) as tier:
        session = tier._session
        former, num_before = object(), len(session.stock)
        session._add_stock(former, wire.Reserved(1, [4, 8], 2))  # type: ignore[arg-type]
        assert len(session.stock) == num_before


def test_a_closing_session_starts_no_owner(
    config: HostConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("shared_cache.host.session.start_owner", lambda *_: started.append(_))
    with owner_process(config) as owner, open_tier(config) as tier:
        session = tier._session
        owner.close()
        tier.close()
        settings = session._terms.config.model_copy(update={"start_owner": True})
        object.__setattr__(session._terms, "config", settings)
        assert not session._try_to_attach()
        assert not can_connect(config)
        assert started == []
