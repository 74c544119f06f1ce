"""Changes of a cache, told in order: who follows them has what is there, whatever was lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cache_changes import ChangeLog, Cursor

keys = st.sets(st.integers(0, 20), max_size=6)


@settings(max_examples=40)
@given(st.lists(st.tuples(keys, keys, st.sampled_from(("told", "lost", "not asked", "cleared")))))
def test_a_reader_that_loses_messages_ends_with_what_is_there(steps):
    log = ChangeLog("device", "boot-1", max_changes=10)
    held, read, cursor = set(), set(), None
    for stored, removed, event in steps:
        if event == "cleared":
            log.clear()
            held = set()
        log.change(stored, removed)
        held = (held - removed) | stored
        if event == "not asked":
            continue
        told = log.since(cursor)
        assert told.continues(cursor)
        if event == "lost":
            continue  # asks again from where it was
        if told.is_snapshot:
            read = set()
        read = (read - set(told.removed)) | set(told.stored)
        cursor = told.end
        assert read == held


def test_a_cursor_of_another_process_or_of_the_future_gets_a_snapshot():
    log = ChangeLog("host", "boot-2")
    log.change([1, 2, 3], [])
    log.change([], [2])
    for cursor in (None, Cursor("boot-1", 0), Cursor("boot-2", 99)):
        told = log.since(cursor)
        assert told.is_snapshot
        assert sorted(told.stored) == [1, 3]
    told = log.since(Cursor("boot-2", 0))
    assert (sorted(told.stored), sorted(told.removed)) == ([1, 3], [2])
    assert not told.continues(Cursor("boot-2", 1))
    assert not log.since(told.end).stored


def test_a_reader_that_fell_too_far_behind_gets_a_snapshot():
    log = ChangeLog("device", "boot", max_changes=3)
    log.change([1], [])
    cursor = log.since(None).end
    log.change([2, 3, 4], [])
    assert not log.since(cursor).is_snapshot
    log.change([5], [1])
    assert log.since(cursor).is_snapshot
