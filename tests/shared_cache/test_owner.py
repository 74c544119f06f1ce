"""The arena's owner, spoken to in plain messages: who is let in, and what ends with whom."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.host import client_socket
from shared_cache.host import protocol as wire
from shared_cache.host.folder import is_locked
from shared_cache.host.journal import EventKind, EventRing
from shared_cache.host.owner import ArenaOwner, OwnerIsRunningError, rules_of
from shared_cache.host.protocol import pack_hashes
from tests.shared_cache.arenas import (
    BLOCK_BYTES,
    ROOT,
    OwnerThread,
    RawClient,
    await_true,
    can_connect,
    hashes_of,
    host_config,
    memory_folder,
    paths_of,
    running_owner,
)

HASHES = hashes_of("owner", 4)


@pytest.fixture
def config() -> Iterator[HostConfig]:
    with memory_folder() as folder:
        yield host_config(folder)


@pytest.fixture
def owner(config: HostConfig) -> Iterator[OwnerThread]:
    with running_owner(config) as owner:
        yield owner


class Clients:
    """Opens clients with growing numbers and closes them all."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self.opened: list[RawClient] = []

    def connect(self, holder: int | None = None, *, is_alive: bool = False) -> RawClient:
        number = holder or len(self.opened) + 1
        self.opened.append(RawClient(self._config, number, is_alive=is_alive))
        return self.opened[-1]

    def attach(self, holder: int | None = None, *, is_alive: bool = False) -> RawClient:
        client = self.connect(holder, is_alive=is_alive)
        assert isinstance(client.attach(), wire.Welcome)
        return client


@pytest.fixture
def clients(config: HostConfig, owner: OwnerThread) -> Iterator[Clients]:
    clients = Clients(config)
    yield clients
    for client in clients.opened:
        client.close()


def _claim(client: RawClient, wait_s: float = 0.0) -> wire.Claimed:
    claimed = client.ask(wire.Claim(1, pack_hashes(HASHES), wait_s))
    assert isinstance(claimed, wire.Claimed)
    return claimed


def _commit(slots: list[int], first: int = 0) -> wire.Commit:
    hashes = HASHES[first : first + len(slots)]
    parent = HASHES[first - 1] if first else ROOT
    return wire.Commit(
        2, slots, parent, pack_hashes(hashes), bytes(8 * len(slots)), b"", False, 35, None
    )


def _stats(client: RawClient) -> tuple[int, int, int, int]:
    """Reserved, used and leased slots, and whether all slots are accounted for."""
    counts = client.ask(wire.GetStats(9)).stats
    total = counts.free_slots + counts.used_slots + counts.reserved_slots
    assert total == counts.num_slots == 256
    return counts.reserved_slots, counts.used_slots, counts.leased_slots, counts.free_slots


def _begin_waiting(client: RawClient) -> None:
    """Send a claim that waits; returns when the owner has it."""
    client.send(wire.Claim(7, pack_hashes(HASHES), 30.0))
    _stats(client)


# Who is let in


def test_a_client_of_another_user_is_cut_off(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = clients.attach()
    other = os.geteuid() + 1
    monkeypatch.setattr(client_socket.os, "geteuid", lambda: other)
    assert clients.connect().attach() is None
    assert _stats(before)[0] == 0


def test_another_protocol_version_is_told_what_to_do(clients: Clients) -> None:
    client = clients.connect()
    refused = client.ask(wire.Attach(99, 1, "one", BLOCK_BYTES))
    assert isinstance(refused, wire.Refused)
    assert "version 99" in refused.reason
    assert "cache.host.name" in refused.reason
    assert client.answer() is None


def test_a_block_larger_than_an_extent_is_told_the_size_that_fits(clients: Clients) -> None:
    refused = clients.connect().attach("big", 3 << 20)
    assert isinstance(refused, wire.Refused)
    assert f"cache.host.bytes to {64 << 20}" in refused.reason


def test_a_fingerprint_without_room_in_the_records_is_refused(clients: Clients) -> None:
    refused = clients.connect().attach("x" * 200)
    assert isinstance(refused, wire.Refused)
    assert "1 to 96 bytes" in refused.reason


# Who breaks the protocol is cut off, and nobody else is


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        (1 << 30).to_bytes(4, "little"),
        b"\x05\0\0\0hello",
        wire.encode_frame(wire.GetStats(1)),
        wire.encode_frame(wire.Attach(wire.PROTOCOL_VERSION, 0, "one", BLOCK_BYTES)),
    ],
    ids=["noise", "huge frame", "no message", "no attach", "bad number"],
)
def test_garbage_ends_its_own_connection_only(clients: Clients, garbage: bytes) -> None:
    good, bad = clients.attach(), clients.connect()
    bad.socket.sendall(garbage)
    assert bad.answer() is None
    assert _stats(good)[0] == 0


@pytest.mark.parametrize(
    "message",
    [
        _commit([0]),
        wire.Commit(2, [0], b"short", b"", b"", b"", False, 35, None),
        wire.Commit(2, [0], ROOT, pack_hashes(HASHES[:1]), b"1234567", b"", False, 35, None),
        wire.Commit(2, [0], ROOT, pack_hashes(HASHES[:1]), bytes(8), bytes(99), False, 35, None),
        wire.Notice(cancelled=[0]),
        wire.Lease(2, b"no hash", 0),
        wire.Lease(2, b"", -1),
        wire.Attach(wire.PROTOCOL_VERSION, 1, "one", BLOCK_BYTES),
    ],
    ids=["foreign slot", "parent", "checksums", "tenant", "cancel", "hash", "first", "attach"],
)
def test_a_broken_request_ends_what_its_sender_holds(
    clients: Clients, message: wire.Message
) -> None:
    good, bad = clients.attach(), clients.attach()
    own = _claim(good).reserved
    bad.ask(wire.Reserve(1, 5))
    bad.send(message)
    assert bad.answer() is None
    assert _stats(good)[0] == len(own)


def test_a_client_that_reads_no_answers_is_cut_off(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_socket, "MAX_UNREAD_BYTES", 1 << 16)
    good, deaf = clients.attach(), clients.attach()
    _claim(deaf)
    questions = wire.encode_frame(wire.GetStats(1)) * (1 << 20)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        deaf.socket.sendall(questions)
    await_true(lambda: _stats(good)[0] == 0)


# What ends with a client


def test_a_dead_clients_leases_and_reservations_end_and_nothing_else(clients: Clients) -> None:
    good, dying = clients.attach(), clients.attach()
    claimed = _claim(dying)
    assert claimed.reserved
    granted = dying.ask(_commit(claimed.reserved[:2]))
    assert len(granted.slots) == 2
    assert _stats(good)[:3] == (2, 2, 2)
    dying.close()
    await_true(lambda: _stats(good)[:3] == (0, 2, 0))
    assert good.ask(wire.Lease(1, pack_hashes(HASHES), 0)).slots == granted.slots


def test_a_living_client_keeps_what_it_has_without_a_connection(clients: Clients) -> None:
    good, away = clients.attach(), clients.attach(is_alive=True)
    claimed = _claim(away)
    away.ask(_commit(claimed.reserved[:2]))
    away.socket.close()
    for _ in range(20):
        assert _stats(good)[:3] == (2, 2, 2)
        time.sleep(0.01)
    assert away.file is not None
    away.file.release()
    await_true(lambda: _stats(good)[:3] == (0, 2, 0))


def test_a_client_that_comes_back_has_what_it_says_and_no_more(
    clients: Clients, owner: OwnerThread
) -> None:
    good, before = clients.attach(), clients.connect(5, is_alive=True)
    boot = before.attach().boot
    slots = _claim(before).reserved
    leased = before.ask(_commit(slots[:2])).slots
    before.ask(wire.Lease(1, pack_hashes(HASHES[:2]), 0))
    again = clients.connect(5)
    reserved = [slots[2], 10**6, slots[0], slots[2]]
    held = {"boot": boot, "leased": leased[:1], "reserved": reserved, "hashes": HASHES[0]}
    welcome = again.attach(**held)
    assert sorted(welcome.refused) == sorted([10**6, slots[0]])
    assert welcome.lost == []
    assert before.answer() is None, "the former connection is closed"
    assert _stats(good)[:3] == (1, 2, 1)
    again.send(wire.Notice(released=leased[:1], cancelled=[slots[2]]))
    assert _stats(again)[:3] == (0, 2, 0)


def test_what_a_client_had_of_another_arena_does_not_count(clients: Clients) -> None:
    good, other = clients.attach(), clients.connect()
    slots = _claim(good).reserved
    welcome = other.attach(boot=bytes(16), leased=slots[:1], reserved=slots[1:2])
    assert welcome.refused == []
    assert _stats(other)[:3] == (4, 0, 0)


def test_two_namespaces_with_blocks_of_two_sizes_share_the_arena(clients: Clients) -> None:
    small, large = clients.attach(), clients.connect()
    large.attach("two", 1 << 20)
    assert len(_claim(small).reserved) == 4
    wanted = pack_hashes(hashes_of("large", 9))
    reserved = large.ask(wire.Claim(1, wanted, 0.0)).reserved
    assert len(reserved) == 2, "one extent is left, with two slots"
    counts = large.ask(wire.GetStats(1)).stats
    assert (counts.num_slots, counts.reserved_slots, counts.block_bytes) == (2, 2, 1 << 20)


# Claims that wait


def test_a_claim_waits_for_the_block_that_another_one_brings(clients: Clients) -> None:
    bringing, waiting = clients.attach(), clients.attach()
    slots = _claim(bringing).reserved
    _begin_waiting(waiting)
    granted = bringing.ask(_commit(slots))
    claimed = waiting.answer()
    assert (claimed.id, claimed.slots, claimed.reserved) == (7, granted.slots, [])
    assert claimed.num_from_peers == 4


def test_a_waiting_claim_is_answered_when_another_one_than_the_claimer_brings(
    clients: Clients,
) -> None:
    slow, waiting, saving = clients.attach(), clients.attach(), clients.attach()
    _claim(slow)
    _begin_waiting(waiting)
    slots = saving.ask(wire.Reserve(1, 4)).slots
    granted = saving.ask(_commit(slots))
    assert waiting.answer().slots == granted.slots


def test_a_waiting_claim_takes_over_what_was_given_up(clients: Clients) -> None:
    bringing, waiting = clients.attach(), clients.attach()
    slots = _claim(bringing).reserved
    bringing.ask(_commit(slots[:1]))
    _begin_waiting(waiting)
    bringing.send(wire.Notice(cancelled=slots[1:]))
    claimed = waiting.answer()
    assert claimed.slots == slots[:1]
    assert len(claimed.reserved) == 3
    assert not claimed.is_coming


def test_a_waiting_claim_takes_over_from_the_dead(clients: Clients) -> None:
    bringing, waiting = clients.attach(), clients.attach()
    _claim(bringing)
    _begin_waiting(waiting)
    bringing.close()
    assert len(waiting.answer().reserved) == 4


def test_a_claim_waits_no_longer_than_asked(clients: Clients) -> None:
    bringing, waiting = clients.attach(), clients.attach()
    _claim(bringing)
    assert _claim(waiting, 0.05).is_coming
    assert _claim(waiting, float("nan")).is_coming


def test_a_client_that_died_waiting_leaves_no_claim_behind(
    clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    bringing, waiting, good = clients.attach(), clients.attach(), clients.attach()
    slots = _claim(bringing).reserved
    bringing.ask(_commit(slots[:1]))
    _begin_waiting(waiting)
    waiting.close()
    await_true(lambda: _stats(good)[:3] == (3, 1, 1))
    bringing.close()
    await_true(lambda: _stats(good)[:3] == (0, 1, 0))
    assert not caplog.records, "nobody tried to answer it"


# Events


def test_events_are_numbered_and_of_ones_own_namespace(clients: Clients) -> None:
    client, other = clients.attach(), clients.connect()
    other.attach("two", BLOCK_BYTES)
    start = client.ask(wire.GetEvents(1, 0)).next
    slots = _claim(client).reserved
    leased = client.ask(_commit(slots)).slots
    client.send(wire.Notice(stored=HASHES[0], released=leased))
    assert client.ask(wire.Drop(1, HASHES[3])).num_blocks == 1
    told = client.ask(wire.GetEvents(1, start))
    assert (told.first, told.next) == (start, start + 6)
    assert told.kinds == bytes([EventKind.BROUGHT] * 4 + [EventKind.STORED, EventKind.EVICTED])
    assert told.hashes == pack_hashes([*HASHES, HASHES[0], HASHES[3]])
    assert client.ask(wire.GetEvents(1, start + 5)).hashes == HASHES[3]
    assert other.ask(wire.GetEvents(1, start)).hashes == b""


def test_forgotten_events_show_as_a_gap() -> None:
    ring = EventRing(100, max_events=3)
    for block_hash in HASHES:
        ring.add(0, EventKind.BROUGHT, block_hash)
    first, end, events = ring.since(100, 0)
    assert (first, end) == (101, 104)
    assert [name for _, name in events] == HASHES[1:]
    assert ring.since(104, 0) == (104, 104, [])
    assert ring.since(999, 0)[0] == 101, "numbers of another owner begin with the oldest event"


# Its life


def test_a_second_owner_is_refused_and_the_first_one_goes_on(
    config: HostConfig, clients: Clients
) -> None:
    good = clients.attach()
    with pytest.raises(OwnerIsRunningError, match=r"cache\.host\.name"):
        OwnerThread(config)
    assert _stats(good)[0] == 0


def test_arenas_of_two_names_are_apart(config: HostConfig, clients: Clients) -> None:
    good = clients.attach()
    _claim(good)
    other_config = config.model_copy(update={"name": "other"})
    with running_owner(other_config):
        other = RawClient(other_config)
        other.attach()
        assert _stats(other)[0] == 0
        other.close()
    assert _stats(good)[0] == 4


def test_a_stopped_owner_leaves_nothing(config: HostConfig) -> None:
    with running_owner(config):
        client = RawClient(config, is_alive=True)
        client.attach()
        assert paths_of(config).arena.exists()
    assert client.answer() is None
    client.close()
    assert list(paths_of(config).folder.iterdir()) == []


def test_an_owner_without_clients_stops_by_itself(config: HostConfig) -> None:
    owner = OwnerThread(config, exit_when_idle_s=0.2)
    client = RawClient(config)
    client.attach()
    time.sleep(0.4)
    assert _stats(client)[0] == 0, "it is not idle while it has a client"
    client.close()
    owner.run(owner.owner.wait_stopped())
    assert list(paths_of(config).folder.iterdir()) == []
    owner.close()


def test_a_start_that_fails_gives_the_lock_back(
    config: HostConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("shared_cache.host.owner.OwnedArena.open", refuse)
        with pytest.raises(ConfigError, match="no room"):
            OwnerThread(config)
    assert not is_locked(paths_of(config).lock)
    with running_owner(config):
        assert can_connect(config)


def test_rules_come_from_the_configuration() -> None:
    config = HostConfig(eviction="priority", quotas={"salt": 1 << 20})
    rules = rules_of(config, "second_use")
    assert list(rules.quotas.values()) == [1 << 20]
    assert [len(tenant) for tenant in rules.quotas] == [8]
    assert rules.admission == "second_use"
    assert type(rules.make_policy(time.monotonic)).__name__ == "PriorityPolicy"
    ArenaOwner(config, rules)


# Its command line


def _command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "shared_cache.host", "--folder", str(folder), *arguments]


def test_the_command_serves_until_it_is_asked_to_stop(config: HostConfig) -> None:
    folder = paths_of(config).folder
    process = subprocess.Popen(
        _command(folder, "--bytes", "4MiB", "--quota", "0011223344556677=1048576"),
        stderr=subprocess.DEVNULL,
    )
    await_true(lambda: can_connect(config))
    client = RawClient(config)
    assert client.attach().arena_bytes == 4 << 20
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    client.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bytes", "much"), "bytes"),
        (("--eviction", "random"), "eviction"),
        (("--quota", "x=1"), "hex"),
    ],
)
def test_the_command_says_which_setting_is_wrong(
    config: HostConfig, arguments: tuple[str, ...], says: str
) -> None:
    command = _command(paths_of(config).folder, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
