"""The owner of a node's arena: one process that keeps the books; no data passes through it.

It may be killed at any moment: its lock falls to the next one, which finds everything that was
whole. Stopped in good order it leaves nothing behind. It can be run by `python -m
shared_cache.host`, or inside any process with an asyncio event loop.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Coroutine, Sequence
from functools import partial

from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.eviction import make_policy
from shared_cache.faults import FaultLog
from shared_cache.hashing import ReuseScope
from shared_cache.host.adoption import Adoption
from shared_cache.host.arena import OwnedArena
from shared_cache.host.client_socket import ClientSocket
from shared_cache.host.folder import (
    ArenaPaths,
    HeldLock,
    is_locked,
    open_folder,
    remove_if_unlocked,
)
from shared_cache.host.index import HostIndex
from shared_cache.host.journal import ArenaJournal, EventRing
from shared_cache.host.leftovers import ALIVE_S, sweep
from shared_cache.host.news import ArenaNews
from shared_cache.host.record_format import DamagedRecordsError
from shared_cache.host.roster import ArenaState, Roster
from shared_cache.host.service import Service
from shared_cache.host.terms import IndexRules, StoreAdmission

logger = logging.getLogger(__name__)

LOOK_AFTER_DEAD_S = 0.05
LOCK_TRIES_S = 1.0
"""For so long the lock is tried: clients lock it for an instant to see whether an owner lives."""


class OwnerIsRunningError(ConfigError):
    """Another process owns this arena."""


def rules_of(config: HostConfig, admission: StoreAdmission) -> IndexRules:
    """The rules that a configuration stands for."""
    quotas = {ReuseScope(salt).tenant: int(limit) for salt, limit in config.quotas.items()}
    return IndexRules(partial(make_policy, config.eviction), quotas, admission)


class ArenaOwner:
    """Owns one arena from `start` to `stop`; both are called once, in one event loop."""

    def __init__(
        self, config: HostConfig, rules: IndexRules, exit_when_idle_s: float | None = None
    ) -> None:
        """With `exit_when_idle_s`, stops by itself when it has had no client for so long."""
        self._config = config
        self._rules = rules
        self._exit_when_idle_s = exit_when_idle_s
        self._faults = FaultLog(logger)
        self._stopped = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._running: _Running | None = None

    async def start(self) -> None:
        """Take the arena over and begin to serve.

        Raises `OwnerIsRunningError` if it has an owner, and another `ConfigError` if its folder or
        the system's memory cannot be used.
        """
        paths = open_folder(self._config)
        lock = await _take_lock(paths)
        try:
            lock.touch()
            await asyncio.to_thread(_sweep, paths)
            self._running = await self._take_over(paths, lock)
        except BaseException:
            lock.release()
            raise
        self._begin(self._look_after(self._running))
        if self._running.adoption is not None:
            self._begin(self._running.adoption.run())
        logger.info("process %d owns the arena %s", os.getpid(), paths.arena)

    @property
    def news(self) -> ArenaNews | None:
        """What its arena holds, gets and loses; None while it owns none."""
        return None if self._running is None else self._running.news

    async def wait_stopped(self) -> None:
        """Return when it has been stopped."""
        await self._stopped.wait()

    async def stop(self) -> None:
        """Stop, and remove the arena; clients keep what they have mapped. A second one: no-op."""
        running, self._running = self._running, None
        if running is None:
            return
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await running.remove()
        self._stopped.set()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    async def _take_over(self, paths: ArenaPaths, lock: HeldLock) -> "_Running":
        living = _living_clients(paths)
        arena_bytes = int(self._config.bytes)
        if is_locked(paths.arena):
            logger.warning("the last owner of %s lost its lock and still works", paths.arena)
            paths.records.unlink(missing_ok=True)
            paths.arena.unlink(missing_ok=True)
        arena = OwnedArena.open(paths, arena_bytes)
        state, adoption = self._open_state(paths, arena), None
        if arena.was_found:
            adoption = Adoption(paths, arena, state.index, state.journal, living)
            try:
                adoption.begin()
            except (DamagedRecordsError, ValueError) as error:
                logger.warning("the arena %s is replaced by a fresh one: %s", paths.arena, error)
                arena.close()
                arena.remove()
                arena = OwnedArena.open(paths, arena_bytes)
                state, adoption = self._open_state(paths, arena), None
        running = _Running(lock, state, adoption, living, self._faults)
        running.lock_arena()
        await running.listen()
        if self._config.populate:
            state.arena.take_all_memory()
        return running

    def _open_state(self, paths: ArenaPaths, arena: OwnedArena) -> ArenaState:
        events = EventRing(time.time_ns())
        journal = ArenaJournal(arena, events)
        sizes = arena.geometry.arena_bytes, arena.geometry.extent_bytes
        index = HostIndex(*sizes, self._rules, journal, time.monotonic)
        return ArenaState(paths, arena, index, journal, events, self._rules.admission)

    async def _look_after(self, running: "_Running") -> None:
        """Notice clients that died without a connection, that nobody is left, and lost files."""
        roster, busy_s, told_s = running.roster, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(LOOK_AFTER_DEAD_S)
            with self._faults.caught("looking after dead clients"):
                roster.look_after_dead()
            if not running.is_in_place():
                logger.error("somebody removed files of a running arena: its owner begins afresh")
                await self.stop()
                return
            now_s = time.monotonic()
            if now_s - told_s > ALIVE_S:
                told_s = now_s
                with self._faults.caught("marking the lock"):
                    running.touch()
            if roster.num_clients:
                busy_s = now_s
            elif self._exit_when_idle_s is not None and now_s - busy_s > self._exit_when_idle_s:
                logger.info("no client for %g s: the owner stops", self._exit_when_idle_s)
                await self.stop()
                return


class _Running:
    """The parts of an owner between start and stop."""

    def __init__(
        self,
        lock: HeldLock,
        state: ArenaState,
        adoption: Adoption | None,
        living: Sequence[int],
        faults: FaultLog,
    ) -> None:
        self._lock = lock
        self._state = state
        self._service = Service(state)
        self._faults = faults
        self._sockets: list[ClientSocket] = []
        self._server: asyncio.AbstractServer | None = None
        self._socket_inode = 0
        self._arena_lock: HeldLock | None = None
        self.adoption = adoption
        self.news = ArenaNews(state.index, state.events)
        self.roster = Roster(state, adoption, living, self._service.look_at_parked)

    async def listen(self) -> None:
        """Begin to serve."""
        paths = self._state.paths
        paths.clients.mkdir(mode=0o700, exist_ok=True)
        paths.socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            self._make_socket, path=str(paths.socket), backlog=1024
        )
        paths.socket.chmod(0o600)
        self._socket_inode = paths.socket.stat().st_ino

    def lock_arena(self) -> None:
        """Let no owner adopt the arena while we work, even if our lock file was removed."""
        self._arena_lock = HeldLock.acquire(self._state.paths.arena)

    def is_in_place(self) -> bool:
        """Whether clients find us, and no other process can take our place."""
        try:
            found = self._state.paths.socket.stat().st_ino
        except FileNotFoundError:
            return False
        return found == self._socket_inode and self._lock.is_in_place()

    def touch(self) -> None:
        """Mark the arena as one that has an owner."""
        self._lock.touch()

    async def remove(self) -> None:
        """End all connections and remove all files, the lock last."""
        if self._server is not None:
            self._server.close()
        for client in self._sockets:
            client.end()
        self.roster.close()
        self._state.arena.close()
        if self._arena_lock is not None:
            self._arena_lock.release()
        if self._lock.is_in_place():  # else somebody cleared the folder, and what is there is new
            self._remove_files(self._state.paths)
        self._lock.release(remove=True)

    def _remove_files(self, paths: ArenaPaths) -> None:
        paths.socket.unlink(missing_ok=True)
        self._state.arena.remove()
        shutil.rmtree(paths.clients, ignore_errors=True)
        paths.log.unlink(missing_ok=True)

    def _make_socket(self) -> ClientSocket:
        self._sockets = [client for client in self._sockets if client.is_open]
        client = ClientSocket(self._service, self.roster, self._faults)
        self._sockets.append(client)
        return client


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the owner goes on without one of its tasks", exc_info=error)


async def _take_lock(paths: ArenaPaths) -> HeldLock:
    deadline_s = time.monotonic() + LOCK_TRIES_S
    while (lock := HeldLock.acquire(paths.lock)) is None:
        if time.monotonic() > deadline_s:
            raise OwnerIsRunningError(
                f"another process owns the arena {paths.arena}: use that one, or set "
                "cache.host.name to another name"
            )
        await asyncio.sleep(0.02)
    return lock


def _sweep(paths: ArenaPaths) -> None:
    try:
        sweep(paths.folder, paths.name)
    except OSError as error:
        logger.warning("cannot remove what dead owners left in %s: %s", paths.folder, error)


def _living_clients(paths: ArenaPaths) -> list[int]:
    """The clients of an old owner that are still there; what the others left is removed."""
    found = list(paths.clients.iterdir()) if paths.clients.is_dir() else []
    return [int(path.name, 16) for path in found if not remove_if_unlocked(path)]
