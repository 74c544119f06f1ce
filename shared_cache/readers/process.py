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
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from shared_cache.readers.messages import (
    GOOD,
    MAX_MESSAGE_BYTES,
    MAX_ROWS,
    Done,
    Forget,
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

HANGS_S = 3.0
"""A piece takes it some milliseconds, and a store call that hangs much longer is noticed anyway."""

END_TIMEOUT_S = 1.0
_ROOT = Path(__file__).resolve().parents[2]


def num_threads_for(wanted: int | None, num_cores: int) -> int:
    """How many threads a reader process gets; 0: none is started. `wanted` None: by the cores."""
    if wanted is not None:
        return wanted
    return min(MAX_THREADS, num_cores * 3 // 4) if num_cores >= MIN_CORES else 0


class _Call:
    """A read that was asked for; `results` stay None when the process is gone."""

    __slots__ = ("done", "num_rows", "results")

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.done = threading.Event()
        self.results: bytes | None = None


class ReaderProcess:
    """Thread-safe. Nothing here raises for the process: it is not usable then, and ended."""

    def __init__(self, num_threads: int) -> None:
        """`start` must follow."""
        self.is_usable = False
        self.ended_s: float | None = None
        self._num_threads = num_threads
        self._lock = threading.RLock()
        self._calls: dict[int, _Call] = {}
        self._memories: dict[bytes, int] = {}
        self._last_id = self._last_memory = 0
        self._is_closed = False
        self._heard_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._hear, name="kvcommons-reader", daemon=True)

    def start(self) -> None:
        """Start the process; it is usable a moment later. Raises `OSError` where there is none."""
        try:
            with self._theirs:
                self._process = _start(self._theirs.fileno(), self._num_threads)
        except OSError:
            self._socket.close()
            raise
        self._thread.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process is not None
        return self._process.pid

    def hold(self, file: int) -> None:
        """See `Hold`."""
        with self._lock:
            self._tell(Hold(), file)

    def memory(self, name: bytes, file: int, num_bytes: int, *, populate: bool) -> int:
        """The number by which the process knows the memory `name`, which is told it if need be."""
        with self._lock:
            number = self._memories.get(name)
            if number is None:
                self._last_memory += 1
                number = self._memories[name] = self._last_memory
                self._tell(UseMemory(number, num_bytes, populate), file)
        return number

    def forget(self, name: bytes) -> None:
        """Have memory forgotten that nobody reads into any more."""
        with self._lock:
            number = self._memories.pop(name, None)
            if number is not None:
                self._tell(Forget(number))

    def begin(self, memory: int, file: int, rows: Sequence[Row]) -> Callable[[], bool]:
        """Have these blocks read; `file` may be closed then.

        What this gives is to be called once: it waits, and says whether all of them are in memory
        now, verified. After that nobody writes there any more. A process that gives no sign of life
        for `HANGS_S` while something is waited for is ended first.
        """
        parts = [rows[start : start + MAX_ROWS] for start in range(0, len(rows), MAX_ROWS)]
        calls = [self._begin(memory, file, part) for part in parts]

        def are_good() -> bool:
            good = [call is not None and self._is_good(call) for call in calls]  # waits for each
            return all(good)

        return are_good

    def close(self) -> None:
        """End the process, and wait until it has ended; a second one is a no-op."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._hang_up()
        if self._thread.ident is not None:
            self._thread.join()

    def abandon_in_child(self) -> None:
        """In a forked child: let go of the parent's connection without a word."""
        self._lock = threading.RLock()
        self._is_closed = True
        self.is_usable = False
        self._socket.close()
        self._theirs.close()

    def _begin(self, memory: int, file: int, rows: Sequence[Row]) -> _Call | None:
        """None when it cannot be asked: then nothing is written."""
        call = _Call(len(rows))
        with self._lock:
            if not self.is_usable:
                return None
            self._last_id += 1
            if not self._send(Read(self._last_id, memory, list(rows)), file):
                return None  # it has more to do than it can hear of
            self._calls[self._last_id] = call
        return call

    def _is_good(self, call: _Call) -> bool:
        sign_s = time.monotonic()
        while not call.done.wait(HANGS_S):
            if self._heard_s <= sign_s:
                logger.warning("the reader process hangs, and is ended")
                self._hang_up()
                call.done.wait()  # until it has ended
            sign_s = self._heard_s
        return call.results is not None and call.results.count(GOOD) == call.num_rows

    def _tell(self, message: Message, *files: int) -> None:
        """Send what must be known; whom it cannot be told is of no use. The lock is held."""
        if not self._send(message, *files):
            self.is_usable = False
            self._hang_up()

    def _send(self, message: Message, *files: int) -> bool:
        """Whether the socket took it; never waits. The lock is held."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", files))] if files else []
        try:  # not `socket.send_fds`, which forgets its flags
            self._socket.sendmsg([encode(message)], rights, socket.MSG_DONTWAIT)
        except OSError as error:
            logger.debug("the reader process could not be told: %s", error)
            return False
        return True

    def _hang_up(self) -> None:
        with self._lock, suppress(OSError):  # it has gone already; `_hear` notices in any case
            self._socket.shutdown(socket.SHUT_RDWR)

    def _hear(self) -> None:
        try:
            while data := self._socket.recv(MAX_MESSAGE_BYTES):
                message = replica_decoder.decode(data)
                self._heard_s = time.monotonic()
                if isinstance(message, Done):
                    with self._lock:
                        call = self._calls.pop(message.id)
                    call.results = message.results
                    call.done.set()
                else:
                    self.is_usable = not self._is_closed
        except (OSError, KeyError, msgspec.DecodeError):
            logger.debug("the connection to the reader process broke", exc_info=True)
        self._end()

    def _end(self) -> None:
        """See to it that the process ends; then whoever waits reads by himself."""
        assert self._process is not None
        with self._lock:
            self.is_usable = False
        self._hang_up()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._is_closed:
            logger.warning("the reader process has ended: blocks are read in this process now")
        with self._lock:
            self._socket.close()
            calls = list(self._calls.values())
            self._calls.clear()
            self.ended_s = time.monotonic()
        for call in calls:
            call.done.set()


def _start(file: int, num_threads: int) -> "subprocess.Popen[bytes]":
    search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "shared_cache.readers.worker", str(file), str(num_threads)],
        stdin=subprocess.DEVNULL,
        pass_fds=[file],
        cwd="/",
        start_new_session=True,  # the terminal's Ctrl-C is for the replica
        env={**os.environ, "PYTHONPATH": search_path},
    )
