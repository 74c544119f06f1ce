"""fsspec file systems that misbehave on command; each needs an fsspec back end of its own.

They are registered under protocols of their own for the length of a test (`registered`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from shared_cache.media import retries


class PlainFile:
    """A file with nothing but what every back end has: no `readinto`, short reads allowed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def read(self, num_bytes: int = -1) -> bytes:
        return self._file.read(num_bytes if num_bytes < 0 else min(num_bytes, 1000))

    def close(self) -> None:
        self._file.close()


class PlainWriter:
    """A file being written; tests replace its `write`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: memoryview) -> int:
        return self.file.write(data)

    def __enter__(self) -> "PlainWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class MountedFileSystem(LocalFileSystem):
    """A local folder that does not look like one: what a file server behind fsspec is like."""

    protocol = "mounted"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.replace("mounted://", "file://", 1))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super().open(path, mode, **kwargs)
        return PlainFile(file) if mode == "rb" else PlainWriter(file)


class FaultyObjects(MemoryFileSystem):
    """An object store that calls `before(operation)` first; the hook may raise."""

    protocol = ("faulty", "memory")
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[str], None]] = staticmethod(lambda operation: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://", 1))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.before("write")
        super().pipe_file(path, value, mode, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> Any:
        self.before("read")
        return super().cat_file(path, start, end)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.before("list")
        return super().find(path, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self.before("remove")
        super().rm_file(path)


@contextmanager
def registered() -> Iterator[None]:
    """Within this block fsspec knows `mounted://` and `faulty://`, and nobody pauses to retry."""
    policy, retries.DEFAULT_POLICY = retries.DEFAULT_POLICY, retries.RetryPolicy(first_pause_s=0.0)
    fsspec.register_implementation("mounted", MountedFileSystem, clobber=True)
    fsspec.register_implementation("faulty", FaultyObjects, clobber=True)
    FaultyObjects.store.clear()
    try:
        yield
    finally:
        retries.DEFAULT_POLICY = policy
        FaultyObjects.store.clear()
        for protocol in ("mounted", "faulty"):
            _registry.pop(protocol)
