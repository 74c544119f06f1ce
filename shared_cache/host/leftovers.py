"""Arenas that nobody owns and nobody uses any more, left by processes that were killed.

They lie in memory, which no reboot of a process gives back: an arena of another name would stay
for ever and leave no room for the next one. What might still be used is left alone: an arena with
an owner, one that is being started, one with a living client, one that was alive a while ago.
"""

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from shared_cache.host.folder import ArenaPaths, HeldLock, is_locked
from shared_cache.host.starting import IDLE_EXIT_S

logger = logging.getLogger(__name__)

ALIVE_S = 60.0
"""So often a living owner marks its lock as young."""


def sweep(folder: Path, own_name: str | None = None) -> list[str]:
    """The names of the arenas whose files were removed now; never that of `own_name`.

    Raises `OSError` if the folder cannot be read or a file not be removed.
    """
    names = {path.stem for pattern in ("*.lock", "*.records") for path in folder.glob(pattern)}
    names.discard(own_name or "")
    return [name for name in sorted(names) if _remove_if_left(ArenaPaths(folder, name))]


def _remove_if_left(paths: ArenaPaths) -> bool:
    if _is_young(paths):
        return False
    has_lock = paths.lock.exists()
    lock = HeldLock.acquire(paths.lock)
    if lock is None:
        return False
    if _is_used(paths) or (has_lock and _is_young(paths)):
        lock.release(remove=not has_lock)
        return False
    for path in (paths.records, paths.arena, paths.socket, paths.log, paths.starter):
        path.unlink(missing_ok=True)
    shutil.rmtree(paths.clients, ignore_errors=True)
    lock.release(remove=True)
    logger.warning("removed the arena %s, which nobody owns or uses any more", paths.arena)
    return True


def _is_young(paths: ArenaPaths) -> bool:
    marks = [path for path in (paths.lock, paths.records) if path.exists()]
    with suppress(FileNotFoundError):  # its owner ends just now
        return time.time() - marks[0].stat().st_mtime < IDLE_EXIT_S if marks else True
    return True


def _is_used(paths: ArenaPaths) -> bool:
    clients = list(paths.clients.iterdir()) if paths.clients.is_dir() else []
    return any(map(is_locked, (paths.arena, paths.starter, *clients)))
