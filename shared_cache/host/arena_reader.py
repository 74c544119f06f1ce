"""The reader process of one client of an arena: started when it is first of use, ended with it.

It holds the client's locked file open, too. So the owner gives nobody the slots of a client that
was killed before its reader has ended as well, which may be in the middle of a block.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence

from shared_cache.config import HostConfig
from shared_cache.host.folder import ClientFile
from shared_cache.host.mapping import MappedArena
from shared_cache.readers.memory import OutsideBuffers
from shared_cache.readers.process import ReaderProcess, num_threads_for
from shared_cache.threads import start_daemon

logger = logging.getLogger(__name__)

RESTART_S = 30.0
"""One that has ended is started again so much later, when it would be of use."""


class ArenaReader:
    """At most one process, for all arenas that its client maps. Thread-safe."""

    def __init__(self, config: HostConfig) -> None:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._num_threads = num_threads_for(config.reader_threads, num_cores)
        self._populate = config.populate
        self._lock = threading.Lock()
        self._is_wanted = self._num_threads > 0
        self._process: ReaderProcess | None = None

    @property
    def may_start(self) -> bool:
        """Whether there is ever a process, on this machine and with these settings."""
        return self._num_threads > 0

    def find(
        self,
        arenas: Sequence[MappedArena],
        addresses: Sequence[int],
        num_bytes: int,
        file: ClientFile,
    ) -> OutsideBuffers | None:
        """See `MappedMemory.outside`. Starts the process if need be, and does not wait for it."""
        first, last = min(addresses), max(addresses) + num_bytes
        arena = next((one for one in arenas if one.holds(first, last)), None)
        if arena is None:
            return None
        process = self._usable(file)
        if process is None:
            return None
        memory = process.memory(arena.boot, arena.file, arena.num_bytes, populate=self._populate)
        return OutsideBuffers(process, memory, [one - arena.address for one in addresses])

    def forget(self, arena: MappedArena) -> None:
        """Nobody reads into this arena any more."""
        process = self._process
        if process is not None:
            process.forget(arena.boot)

    def _usable(self, file: ClientFile) -> ReaderProcess | None:
        process = self._process
        if process is not None and process.is_usable:
            return process
        if self._is_due(process):
            with self._lock:
                if self._process is process and self._is_due(process):
                    self._is_wanted, self._process = False, None
                    start_daemon(lambda: self._start(file), "kvcommons-start-reader")
        return None

    def _is_due(self, process: ReaderProcess | None) -> bool:
        """Whether one is to be started now: the first one, or another one after `process`."""
        if not self._num_threads or process is None:
            return self._is_wanted
        return process.ended_s is not None and time.monotonic() - process.ended_s > RESTART_S

    def show(self, file: ClientFile) -> None:
        """The client's file is another one now."""
        with self._lock:
            if self._process is not None:
                file.lend(self._process.hold)

    def close(self) -> None:
        """End the process, and start none any more."""
        with self._lock:
            self._is_wanted = False
            self._num_threads = 0
            process = self._process
        if process is not None:
            process.close()

    def abandon_in_child(self) -> None:
        """In a forked child: the process is the parent's."""
        self._lock = threading.Lock()
        self._is_wanted = False
        self._num_threads = 0
        if self._process is not None:
            self._process.abandon_in_child()

    def _start(self, file: ClientFile) -> None:
        with self._lock:
            if not self._num_threads:
                return
            try:
                # Known before it is started: a child that is forked meanwhile lets go of it, too.
                self._process = ReaderProcess(self._num_threads)
                self._process.start()
            except OSError as error:
                logger.warning("no reader process: blocks are read in this one (%s)", error)
                self._process = None
                return
            file.lend(self._process.hold)
