"""What a replica tells of its device and of host memory that only it reads."""

from actors.cache_changes import CacheChanges
from actors.cache_reports import CacheReports
from actors.routing.index import routing_keys
from shared_cache.hashing import block_hashes

HASHES = tuple(block_hashes(range(32), 4))
KEYS = list(routing_keys(HASHES))


def told(reports: CacheReports, changes: CacheChanges, read=()):
    device, host = reports.since(lambda: changes, {one.tier: one.end for one in read})
    return device, host


def held(changes) -> set[int]:
    return set(changes.stored)


def test_offloaded_blocks_move_to_the_replicas_own_host_memory_and_back():
    reports = CacheReports("boot")
    first = told(reports, CacheChanges(stored=HASHES))
    assert [held(one) for one in first] == [set(KEYS), set()]
    second = told(reports, CacheChanges(offloaded=HASHES[4:], removed=HASHES[2:4]), first)
    device, host = second
    assert (set(device.removed), held(host)) == (set(KEYS[2:]), set(KEYS[4:]))
    device, host = told(reports, CacheChanges(stored=HASHES[4:6]), second)
    assert (held(device), set(host.removed)) == (set(KEYS[4:6]), set(KEYS[4:6]))
    assert not device.is_snapshot


def test_own_host_memory_that_tells_nothing_is_taken_to_hold_what_came_last():
    reports = CacheReports("boot", own_host_blocks=6)
    told(reports, CacheChanges(stored=HASHES[:4]))
    told(reports, CacheChanges(stored=HASHES[4:], removed=HASHES[:4]))
    device, host = told(reports, CacheChanges())
    assert (held(device), held(host)) == (set(KEYS[4:]), set(KEYS[2:]))


def test_an_engine_that_begins_anew_has_nothing_but_what_it_tells():
    reports = CacheReports("boot")
    first = told(reports, CacheChanges(stored=HASHES))
    device, _ = told(reports, CacheChanges(stored=HASHES[:1], is_cleared=True), first)
    assert device.is_snapshot
    assert held(device) == {KEYS[0]}
