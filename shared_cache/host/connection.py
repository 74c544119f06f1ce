"""A client's connection to the owner of the arena: requests with a time limit, and notices.

The owner may be stopped, dead or slow; no caller may hang on it, and no answer that came too late
may leave a lease behind that nobody ends. Nothing is sent that would have to be waited for: what
the socket does not take at once, a thread of its own sends.
"""

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from shared_cache.host import protocol as wire

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 18
TICK_S = 1.0
GATHER_S = 0.001
"""So long notices are gathered before they are sent; a request takes them along at once."""


OnReply = Callable[[wire.Reply], None]


class AwayError(Exception):
    """The owner is not there now; nothing was sent."""


class _Signal:
    """What `threading.Event` is for one waiter; several times faster, as it is one lock."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let the waiter go on; to be called by one thread at a time."""
        if not self._is_set:
            self._is_set = True
            self._lock.release()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Wait for `set`; to be called once."""
        return self._lock.acquire(timeout=timeout_s)


class _Call:
    """A request that was sent; `on_reply` is called if nobody waits (any more)."""

    __slots__ = ("done", "is_awaited", "on_reply", "reply")

    def __init__(self, on_reply: OnReply | None, *, is_awaited: bool) -> None:
        self.on_reply = on_reply
        self.is_awaited = is_awaited
        self.done = _Signal()
        self.reply: wire.Reply | None = None


class _Outbox:
    """What is to be sent, in order; takes no longer than the socket does. Not thread-safe."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._frames: deque[memoryview] = deque()

    def put(self, message: wire.Message) -> None:
        """Send this behind all the others; `FrameError` for a message that is too long."""
        self._frames.append(memoryview(wire.encode_frame(message)))

    def put_notices(self, notices: deque[wire.Notice]) -> None:
        """Send these, and empty the queue; they travel as one."""
        if not notices:
            return
        whole = wire.Notice()
        while notices:
            notice = notices.popleft()
            whole.released.extend(notice.released)
            whole.cancelled.extend(notice.cancelled)
            whole.stored += notice.stored
            whole.not_stored += notice.not_stored
        self.put(whole)

    def send(self) -> bool:
        """Send what the socket takes at once; whether that was all."""
        while self._frames:
            frame = self._frames[0]
            try:
                num_sent = self._socket.send(frame, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True  # the reader will notice
            if num_sent < len(frame):
                self._frames[0] = frame[num_sent:]
            else:
                self._frames.popleft()
        return True


class OwnerLink:
    """One connection, from its socket's begin to its end. Thread-safe.

    Notices are kept until `start`; requests before it, and when the owner does not answer, raise
    `AwayError`.
    """

    def __init__(self, connected: socket.socket, on_tick: Callable[["OwnerLink"], None]) -> None:
        """`on_tick` is called about once a second, and after `wake`, in a thread of the link."""
        self._socket = connected
        self._on_tick = on_tick
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._notices: deque[wire.Notice] = deque()
        self._outbox = _Outbox(connected)
        self._is_usable = False
        self._is_ended = False
        self._wake = threading.Event()
        self._sender = threading.Thread(target=self._send, name="kvcommons-send", daemon=True)

    @property
    def is_usable(self) -> bool:
        """Whether the owner is expected to answer."""
        return self._is_usable

    def exchange(self, message: wire.Attach, timeout_s: float) -> wire.OwnerMessage:
        """The answer to the first message, before `start`; raises `OSError` if there is none."""
        self._socket.settimeout(timeout_s)
        self._socket.sendall(wire.encode_frame(message))
        frames = wire.FrameReader()
        while True:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionError("the owner closed the connection")
            for frame in frames.feed(data):
                return wire.owner_decoder.decode(frame)

    def start(self) -> None:
        """Begin to send; to be called once, after `exchange`. `read` must follow."""
        self._socket.settimeout(None)
        with self._lock:
            self._is_usable = not self._is_ended
        self._sender.start()
        self._wake.set()

    def read(self) -> None:
        """Receive answers until the connection ends; whoever waits then gets none."""
        frames = wire.FrameReader()
        try:
            while data := self._socket.recv(RECEIVE_BYTES):
                self._is_usable = not self._is_ended
                for frame in frames.feed(data):
                    self._settle(wire.owner_decoder.decode(frame))
        except (OSError, ValueError, msgspec.DecodeError):
            logger.debug("the connection to the owner broke", exc_info=True)
        finally:
            self.end()

    def ask(
        self, request: wire.Request, timeout_s: float, on_late: OnReply | None
    ) -> wire.Reply | None:
        """The owner's answer; None if it does not come in time, or the connection ends.

        `on_late` gets an answer that comes too late. Raises `AwayError` if nothing was sent.
        """
        call = _Call(on_late, is_awaited=True)
        self._send_request(request, call)
        if not call.done.wait(timeout_s):
            with self._lock:
                if not call.done.is_set():
                    call.is_awaited = False
                    self._is_usable = False
        return call.reply

    def post(self, request: wire.Request, on_reply: OnReply) -> None:
        """Send a request whose answer `on_reply` gets, in another thread, if it comes."""
        self._send_request(request, _Call(on_reply, is_awaited=False))

    def tell(self, notice: wire.Notice) -> None:
        """Send a notice soon, before any later request; never waits."""
        self._notices.append(notice)
        self.wake()

    def forget_notices(self) -> None:
        """Before `start`: what was told so far is not to be sent."""
        self._notices.clear()

    def wake(self) -> None:
        """Let `on_tick` be called soon; never waits."""
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, timeout_s: float) -> None:
        """Wait until all notices are sent, if that can be done in time."""
        if self._is_usable and not self._pump():
            self._wait_writable(timeout_s)
            self._pump()

    def end(self) -> None:
        """End the connection and its threads; a second one is a no-op."""
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
            self._is_usable = False
            calls = list(self._calls.values())
            self._calls.clear()
        self._shut_down()
        self._wake.set()
        for call in calls:
            call.done.set()
        if self._sender.ident is not None and self._sender is not threading.current_thread():
            self._sender.join()
        self._socket.close()

    def abandon_in_child(self) -> None:
        """In a forked child: let go of the parent's connection without a word."""
        self._lock = threading.Lock()
        self._is_ended = True
        self._is_usable = False
        self._socket.close()

    def _shut_down(self) -> None:
        with suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send_request(self, request: wire.Request, call: _Call) -> None:
        with self._lock:
            if self._is_ended or not self._is_usable:
                raise AwayError
            self._last_id += 1
            request.id = self._last_id
            self._outbox.put_notices(self._notices)
            self._outbox.put(request)
            self._calls[request.id] = call
            is_sent = self._outbox.send()
        if not is_sent:
            self.wake()

    def _settle(self, reply: wire.OwnerMessage) -> None:
        if not isinstance(reply, wire.Reply):
            raise wire.FrameError("an answer to nothing")
        with self._lock:
            call = self._calls.pop(reply.id, None)
            if call is None:
                raise wire.FrameError("an answer to nothing")
            if call.is_awaited:
                call.reply = reply
                call.done.set()
                return
        if call.on_reply is not None:
            call.on_reply(reply)

    def _send(self) -> None:
        """Call `on_tick` and send what is left to send, until the link ends."""
        while not self._is_ended:
            self._wake.wait(TICK_S)
            self._wake.clear()
            if self._is_ended:
                return
            time.sleep(GATHER_S)
            self._on_tick(self)
            while not self._pump() and not self._is_ended:
                self._wait_writable(TICK_S)

    def _pump(self) -> bool:
        """Send what the socket takes now; whether that was all."""
        with self._lock:
            if self._is_ended:
                return True
            self._outbox.put_notices(self._notices)
            return self._outbox.send()

    def _wait_writable(self, timeout_s: float) -> None:
        poll = select.poll()  # `select` knows no file numbers above 1023
        try:
            poll.register(self._socket, select.POLLOUT)
        except ValueError:
            return  # closed
        poll.poll(timeout_s * 1000)
