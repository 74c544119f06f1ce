"""The reader process: `python -m shared_cache.readers.worker SOCKET THREADS`.

It imports nothing heavy, holds the interpreter's lock for moments only, and ends with its replica.
What may not be told here, as that a file cannot be read, is found out by who asked.
"""

import mmap
import os
import queue
import signal
import socket
import sys
import threading
from contextlib import suppress

import xxhash

from shared_cache.readers.messages import (
    GOOD,
    MAX_MESSAGE_BYTES,
    Done,
    Forget,
    Message,
    Read,
    Ready,
    Row,
    UseMemory,
    encode,
    reader_decoder,
)

PIECE_BYTES = 1 << 20
"""Read and hashed in turn: on 16 cores faster than 256 KiB and than a whole block of 4 MiB."""

LESS_URGENT = 10
"""As many threads as cores would make each question to the arena's owner take milliseconds."""

POPULATE_BYTES = 2 << 20
MADV_POPULATE_WRITE = 23


class _Request:
    """One `Read` on its way; closes its file when all rows are done."""

    def __init__(self, message: Read, file: int, memory: memoryview) -> None:
        self._id = message.id
        self._rows = message.rows
        self._file = file
        self._memory = memory
        self._results = bytearray(len(message.rows))
        self._num_left = len(message.rows)
        self._lock = threading.Lock()

    def run(self, index: int) -> Done | None:
        """Read one row; the answer, after the last one."""
        with suppress(Exception):  # who asked reads it again, and meets the error there
            self._results[index] = GOOD if self._is_good(self._rows[index]) else 0
        with self._lock:
            self._num_left -= 1
            if self._num_left:
                return None
        os.close(self._file)
        return Done(self._id, bytes(self._results))

    def _is_good(self, row: Row) -> bool:
        start, place, num_bytes, seed, checksum = row
        view = self._memory[place : place + num_bytes]
        digest = xxhash.xxh3_64(seed=seed)
        for position in range(0, num_bytes, PIECE_BYTES):
            piece = view[position : position + PIECE_BYTES]
            if os.preadv(self._file, [piece], start + position) < piece.nbytes:
                return False
            digest.update(piece)
        return digest.intdigest() == checksum


class Reader:
    """Answers one replica over `connected`, with so many threads that read."""

    def __init__(self, connected: socket.socket, num_threads: int) -> None:
        self._socket = connected
        self._memories: dict[int, memoryview] = {}
        self._held: int | None = None
        self._waiting: queue.SimpleQueue[tuple[_Request, int]] = queue.SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def serve(self) -> None:
        """Do what is asked until the replica has gone."""
        self._send(Ready())
        while True:
            data, files, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            message = reader_decoder.decode(data)
            if isinstance(message, Forget):
                self._memories.pop(message.memory, None)
            elif files:
                self._handle(message, files[0])
            elif isinstance(message, Read):  # this process may open no more files
                self._send(Done(message.id, bytes(len(message.rows))))

    def _handle(self, message: Message, file: int) -> None:
        if isinstance(message, Read):
            memory = self._memories.get(message.memory, memoryview(b""))
            request = _Request(message, file, memory)
            for index in range(len(message.rows)):
                self._waiting.put((request, index))
        elif isinstance(message, UseMemory):
            self._use(message, file)
        else:
            if self._held is not None:
                os.close(self._held)
            self._held = file

    def _use(self, message: UseMemory, file: int) -> None:
        mapping = mmap.mmap(file, message.num_bytes)
        os.close(file)
        with suppress(OSError):  # only advice; kernels without huge pages refuse it
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._memories[message.memory] = memoryview(mapping)
        if message.populate:
            threading.Thread(target=_populate, args=(mapping,), daemon=True).start()

    def _work(self) -> None:
        while True:
            request, index = self._waiting.get()
            answer = request.run(index)
            del request
            if answer is not None:
                self._send(answer)

    def _send(self, message: Message) -> None:
        with suppress(OSError):  # it has gone; `serve` notices
            self._socket.send(encode(message))


def _populate(mapping: mmap.mmap) -> None:
    """Map pages that are there already: reads need not stop for that later."""
    with suppress(OSError):  # an older system
        for start in range(0, len(mapping), POPULATE_BYTES):
            mapping.madvise(MADV_POPULATE_WRITE, start, min(POPULATE_BYTES, len(mapping) - start))


def main() -> None:
    """Serve, then end at once: threads in the middle of a block must not write on.

    Who owns the arena and who computes go first: they have little to do, and much waits for it.
    """
    os.nice(LESS_URGENT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the replica decides when it ends
    Reader(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
