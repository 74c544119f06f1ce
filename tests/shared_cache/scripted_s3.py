"""An S3 server in this process that does what a test's script says, which moto cannot.

It keeps objects in memory and checks no signature. A script sees each request before it is served
and may answer it otherwise: with a status, late, or with a body that ends too early.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


@dataclass(frozen=True)
class Request:
    method: str
    key: str
    range: str | None
    is_conditional: bool


@dataclass(frozen=True)
class Answer:
    """An answer instead of the right one; `code` is S3's word for the error."""

    status: int
    code: str = ""


class Cut:
    """The right answer, of which half the body is sent before the connection ends."""


class HangUp:
    """No answer: the connection is closed."""


Script = Callable[[Request], Answer | Cut | HangUp | None]


class ScriptedS3:
    """The server: `objects` by key, `requests` as they came, `script` to be set by the test."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.script: Script = lambda request: None
        self.lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint_url": self.endpoint_url, "key": "k", "secret": "s"}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def running_scripted_s3() -> Iterator[ScriptedS3]:
    server = ScriptedS3()
    server.start()
    try:
        yield server
    finally:
        server.script = lambda request: Answer(500)
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, s3: ScriptedS3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.s3 = s3

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has given up is what some tests are about; all else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(
            self.command, key, self.headers.get("Range"), "If-None-Match" in self.headers
        )
        with self.server.s3.lock:
            self.server.s3.requests.append(request)
        answer = self.server.s3.script(request)
        if isinstance(answer, HangUp):
            self.close_connection = True
        elif isinstance(answer, Answer):
            self._error(answer.status, answer.code)
        elif bucket != BUCKET:
            self._error(404, "NoSuchBucket")
        elif self.command == "POST":
            self._delete_listed(body)
        elif not key:
            self._list(parse_qs(url.query).get("prefix", [""])[0])
        elif self.command == "PUT":
            self._put(request, body)
        elif self.command == "DELETE":
            with self.server.s3.lock:
                self.server.s3.objects.pop(key, None)
            self._send(204, b"")
        else:
            self._get(request, is_cut=isinstance(answer, Cut))

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve

    def _put(self, request: Request, body: bytes) -> None:
        with self.server.s3.lock:
            if request.is_conditional and request.key in self.server.s3.objects:
                self._error(412, "PreconditionFailed")
                return
            self.server.s3.objects[request.key] = body
        self._send(200, b"")

    def _get(self, request: Request, is_cut: bool) -> None:
        with self.server.s3.lock:
            data = self.server.s3.objects.get(request.key)
        if data is None:
            self._error(404, "NoSuchKey")
            return
        first, last = 0, len(data) - 1
        if request.range is not None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range)
            assert match is not None
            first, last = int(match[1]), min(last, int(match[2] or last))
            if first > last:
                self._error(416, "InvalidRange")
                return
        span = f"bytes {first}-{last}/{len(data)}"
        self._send(206 if request.range else 200, data[first : last + 1], span, is_cut=is_cut)

    def _delete_listed(self, body: bytes) -> None:
        """As older releases of obstore ask for it."""
        keys = re.findall(rb"<Key>(.*?)</Key>", body)
        with self.server.s3.lock:
            for key in keys:
                self.server.s3.objects.pop(key.decode(), None)
        deleted = b"".join(b"<Deleted><Key>%b</Key></Deleted>" % key for key in keys)
        self._send(200, b"<DeleteResult>%b</DeleteResult>" % deleted)

    def _list(self, prefix: str) -> None:
        with self.server.s3.lock:
            found = {k: len(v) for k, v in self.server.s3.objects.items() if k.startswith(prefix)}
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
            for key, size in sorted(found.items())
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        self._send(200, text.encode())

    def _error(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _send(self, status: int, body: bytes, span: str = "", is_cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Mon, 02 Mar 2026 03:04:05 GMT")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut
