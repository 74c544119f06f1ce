"""A replica's side of its reader process: started beside it, asked by any thread.

Sixteen threads that read in the engine's own process take the interpreter's lock from it at every
block: on 16 cores a prefix then took nearly twice as long as the same reads alone, and a question
to the arena's owner milliseconds. Should the process die, the replica's own threads read as before.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from shared_cache.readers.messages import (
    GOOD,
    MAX_MESSAGE_BYTES,
    Done,
    Hold,
    Message,
    Read,
    Row,
    UseMemory,
    encode,
    replica_decoder,
)

logger = logging.getLogger(__name__)

MAX_THREADS = 16
MIN_CORES = 8
"""With fewer cores there are none for a process beside the engine, and nothing was gained."""

END_TIMEOUT_S = 2.0
_ROOT = Path(__file__).resolve().parents[2]


def num_threads_for(wanted: int | None, num_cores: int) -> int:
    """How many threads a reader process gets; 0: none is started. `wanted` None: by the cores."""
    if wanted is not None:
        return wanted
    return min(MAX_THREADS, num_cores) if num_cores >= MIN_CORES else 0


class _Call:
    """A read that was asked for; `results` stay None when the process is gone."""

    __slots__ = ("done", "results")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.results: bytes | None = None


class ReaderProcess:
    """Thread-safe. Nothing here raises for the process: it is not usable then."""

    def __init__(self, num_threads: int) -> None:
        """Starts it; it is usable a moment later."""
        self.is_usable = False
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._memories: dict[bytes, int] = {}
        self._last_id = 0
        self._is_ended = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start(theirs.fileno(), num_threads)
        self._thread = threading.Thread(target=self._hear, name="kvcommons-reader", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def hold(self, file: int) -> None:
        """See `Hold`."""
        self._tell(Hold(), file)

    def memory(self, name: bytes, file: int, num_bytes: int, *, populate: bool) -> int:
        """The number by which the process knows the memory `name`, which is told it if need be."""
        with self._lock:
            number = self._memories.get(name)
            if number is None:
                number = self._memories[name] = len(self._memories)
                self._send(UseMemory(number, num_bytes, populate), file)
        return number

    def read(self, memory: int, file: int, rows: Sequence[Row]) -> bool:
        """Whether all of these blocks are in memory now, verified. Waits as long as it takes.

        So nobody writes there any more when it is False.
        """
        call = _Call()
        with self._lock:
            if not self.is_usable:
                return False
            self._last_id += 1
            self._calls[self._last_id] = call
            self._send(Read(self._last_id, memory, list(rows)), file)
        call.done.wait()
        return call.results is not None and call.results.count(GOOD) == len(rows)

    def close(self) -> None:
        """End the process, and wait until it has ended; a second one is a no-op."""
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def abandon_in_child(self) -> None:
        """In a forked child: let go of the parent's connection without a word."""
        self._lock = threading.Lock()
        self._is_ended = True
        self.is_usable = False
        self._socket.close()

    def _tell(self, message: Message, file: int) -> None:
        with self._lock:
            self._send(message, file)

    def _send(self, message: Message, file: int) -> None:
        """The lock is held."""
        with suppress(OSError):  # it has gone; `_hear` notices
            socket.send_fds(self._socket, [encode(message)], [file])

    def _hear(self) -> None:
        try:
            while data := self._socket.recv(MAX_MESSAGE_BYTES):
                message = replica_decoder.decode(data)
                if isinstance(message, Done):
                    with self._lock:
                        call = self._calls.pop(message.id)
                    call.results = message.results
                    call.done.set()
                else:
                    self.is_usable = not self._is_ended
        except (OSError, KeyError, msgspec.DecodeError):
            logger.debug("the connection to the reader process broke", exc_info=True)
        self._end()

    def _end(self) -> None:
        """After the process has ended, which is seen to: then whoever waits reads by himself."""
        with self._lock:
            self.is_usable = False
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._is_ended:
            logger.warning("the reader process has ended: blocks are read in this process now")
        with self._lock:
            calls = list(self._calls.values())
            self._calls.clear()
        for call in calls:
            call.done.set()


def _start(file: int, num_threads: int) -> "subprocess.Popen[bytes]":
    search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "shared_cache.readers.worker", str(file), str(num_threads)],
        stdin=subprocess.DEVNULL,
        pass_fds=[file],
        cwd="/",
        env={**os.environ, "PYTHONPATH": search_path},
    )
