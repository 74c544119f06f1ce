"""The S3 operations that a block store uses, one file for each object; sends by `sendfile`.

A program of its own (`aiohttp_s3.py FOLDER PORT`), so that it takes no time of the process that is
measured. It checks no signature and knows no multipart uploads.
"""

import asyncio
import itertools
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

READ_BYTES = 4 << 20
_numbers = itertools.count()


class Buckets:
    """The folders below `data` as buckets."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def routes(self) -> list[web.RouteDef]:
        """What is served; HEAD comes with GET."""
        key = "/{bucket}/{key:.+}"
        return [
            web.get("/{bucket}", self.list),
            web.get("/{bucket}/", self.list),
            web.get(key, self.get),
            web.put(key, self.put),
            web.delete(key, self.delete),
        ]

    async def get(self, request: web.Request) -> web.StreamResponse:
        """An object, or the range of it that is asked for."""
        path = self._path(request)
        return web.FileResponse(path) if path.is_file() else _error(404, "NoSuchKey")

    async def put(self, request: web.Request) -> web.StreamResponse:
        """A whole object, visible at once; with If-None-Match only where there is none yet."""
        path = self._path(request)
        if request.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            return _error(501, "NotImplemented")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{next(_numbers)}.tmp")
        with temporary.open("wb") as file:
            async for piece in request.content.iter_any():
                file.write(piece)
        if "If-None-Match" in request.headers and path.exists():
            temporary.unlink()
            return _error(412, "PreconditionFailed")
        temporary.rename(path)
        return web.Response(headers={"ETag": f'"{path.stat().st_mtime_ns:x}"'})

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Nothing is left; one that is gone is no error."""
        self._path(request).unlink(missing_ok=True)
        return web.Response(status=204)

    async def list(self, request: web.Request) -> web.StreamResponse:
        """All objects below a prefix, in one answer."""
        bucket = self._data / request.match_info["bucket"]
        if not bucket.is_dir():
            return _error(404, "NoSuchBucket")
        prefix = request.query.get("prefix", "")
        sizes = {
            str(path.relative_to(bucket)): path.stat().st_size
            for path in sorted(bucket.rglob("*"))
            if path.is_file()
        }
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in sizes.items()
            if key.startswith(prefix)
        )
        return _xml(200, "ListBucketResult", f"<IsTruncated>false</IsTruncated>{contents}")

    def _path(self, request: web.Request) -> Path:
        path = (self._data / request.match_info["bucket"] / request.match_info["key"]).resolve()
        if not path.is_relative_to(self._data):
            raise web.HTTPForbidden
        return path


def _error(status: int, code: str) -> web.Response:
    return _xml(status, "Error", f"<Code>{code}</Code>")


def _xml(status: int, root: str, inner: str) -> web.Response:
    text = f"<{root}>{inner}</{root}>"
    return web.Response(status=status, text=text, content_type="application/xml")


async def serve(data: Path, port: int) -> None:
    """Serve until this process is told to end."""
    app = web.Application()
    app.add_routes(Buckets(data).routes())
    runner = web.AppRunner(app, access_log=None, read_bufsize=READ_BYTES)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]).resolve(), int(sys.argv[2])))
