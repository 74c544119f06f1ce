"""Arenas that killed owners left: removed when nobody can be using them, and only then."""

import os
import time
from collections.abc import Iterator

import pytest

from shared_cache.config import HostConfig
from shared_cache.host import owner as owner_module
from shared_cache.host.folder import HeldLock
from shared_cache.host.leftovers import sweep
from shared_cache.host.starting import IDLE_EXIT_S
from tests.shared_cache.arenas import (
    OwnerProcess,
    await_true,
    host_config,
    memory_folder,
    paths_of,
    running_owner,
)


@pytest.fixture
def left() -> Iterator[HostConfig]:
    """The arena of an owner that was killed, long ago."""
    with memory_folder() as folder:
        config = host_config(folder, name="left")
        OwnerProcess(config).kill()
        _make_old(config)
        yield config


def _make_old(config: HostConfig) -> None:
    long_ago_s = time.time() - IDLE_EXIT_S - 1
    for path in (paths_of(config).lock, paths_of(config).records):
        os.utime(path, (long_ago_s, long_ago_s))


def _start_another(config: HostConfig) -> list[str]:
    """What is left of the arena when an owner of another one has started."""
    with running_owner(config.model_copy(update={"name": "another"})):
        folder = paths_of(config).folder
        return sorted(path.name for path in folder.iterdir() if path.name.startswith("left"))


def test_another_owners_start_removes_an_old_arena(left: HostConfig) -> None:
    assert paths_of(left).arena.exists()
    assert _start_another(left) == []


def test_a_young_arena_stays_to_be_adopted(left: HostConfig) -> None:
    os.utime(paths_of(left).lock)
    assert "left.arena" in _start_another(left)


def test_an_arena_with_a_living_client_stays(left: HostConfig) -> None:
    client = HeldLock.acquire(paths_of(left).client(7))
    assert client is not None
    assert "left.arena" in _start_another(left)
    client.release()
    assert _start_another(left) == []


def test_an_arena_with_an_owner_or_a_starter_stays(left: HostConfig) -> None:
    for path in (paths_of(left).lock, paths_of(left).starter):
        lock = HeldLock.acquire(path)
        assert lock is not None
        assert "left.arena" in _start_another(left)
        lock.release()


def test_an_old_arena_without_a_lock_is_removed_too(left: HostConfig) -> None:
    paths = paths_of(left)
    paths.lock.unlink()
    client = HeldLock.acquire(paths.client(7))
    assert client is not None
    assert sweep(paths.folder) == []
    assert not paths.lock.exists(), "a sweep leaves no lock behind"
    client.release()
    assert sweep(paths.folder) == ["left"]
    assert list(paths.folder.iterdir()) == []


def test_an_owner_never_removes_its_own_arena(left: HostConfig) -> None:
    assert sweep(paths_of(left).folder, "left") == []


def test_a_living_owner_keeps_its_lock_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "ALIVE_S", 0.0)
    with memory_folder() as folder, running_owner(host_config(folder)):
        _make_old(host_config(folder))
        lock = paths_of(host_config(folder)).lock
        await_true(lambda: time.time() - lock.stat().st_mtime < IDLE_EXIT_S)
