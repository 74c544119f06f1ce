"""An S3 server on loopback that is faster than its clients, so that these are what is measured.

moto takes most of the time of a request itself. Here nginx serves files from a folder in memory,
or, where there is no nginx, `aiohttp_s3` in a process of its own. Neither checks signatures:
anybody on this machine may read and write while it runs. nginx cannot list.

    with running_s3_server() as server:
        server.endpoint_url, server.bucket
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "kvcommons-benchmark"
START_TIMEOUT_S = 20.0

_NGINX_CONF = """\
daemon off;
worker_processes 1;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type application/octet-stream;
    map $request_method $put_etag {{ PUT '"put"'; default ""; }}
    add_header ETag $put_etag;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/data;
        location / {{
            dav_methods PUT DELETE;
            create_full_put_path on;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class S3Server:
    """A running server: `kind` is nginx or aiohttp, `bucket` exists and is empty."""

    endpoint_url: str
    bucket: str
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of a store or of s3fs for it; the credentials are not checked."""
        return {"endpoint_url": self.endpoint_url, "key": "benchmark", "secret": "benchmark"}


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """Run a server with one empty bucket on a folder in memory; both are gone afterwards."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvcommons-s3-", dir=shm) as name:
        folder = Path(name)
        (folder / "data" / BUCKET).mkdir(parents=True)
        port = _free_port()
        nginx = shutil.which("nginx")
        command = _nginx(nginx, folder, port) if nginx else _aiohttp(folder, port)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                _wait_until_it_listens(process, port)
                kind = "nginx" if nginx else "aiohttp"
                yield S3Server(f"http://127.0.0.1:{port}", BUCKET, kind)
            finally:
                process.terminate()


def _nginx(binary: str, folder: Path, port: int) -> list[str]:
    config = folder / "nginx.conf"
    user = f"user {Path.home().owner()};\n" if os.geteuid() == 0 else ""
    config.write_text(user + _NGINX_CONF.format(folder=folder, port=port))
    return [binary, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]


def _aiohttp(folder: Path, port: int) -> list[str]:
    program = Path(__file__).resolve().with_name("aiohttp_s3.py")
    return [sys.executable, str(program), str(folder / "data"), str(port)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"the S3 server did not start: {process.args!r} (exit {process.poll()})")
