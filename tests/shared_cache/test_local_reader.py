"""Reading from a local disk, around the page cache where the bytes are not there."""

import errno
import itertools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared_cache.media import local_medium, page_cache
from shared_cache.media.local_medium import LocalMedium


class TestReadingAroundThePageCache:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "file"
        path.write_bytes(os.urandom(64 * 4096 + 100))
        return path

    @pytest.fixture
    def is_told(self, path: Path) -> None:
        if self.share(path, 0, 4096) is None:
            pytest.skip("this kernel does not tell what is in memory")

    def share(self, path: Path, start: int, num_bytes: int) -> float | None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return page_cache.share_in_memory(descriptor, start, num_bytes)
        finally:
            os.close(descriptor)

    def forget(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def check_reads(self, path: Path, start: int, sizes: Sequence[int], offset: int = 0) -> None:
        """Read into page-aligned memory, `offset` bytes behind where a page begins."""
        wanted = path.read_bytes()[start : start + sum(sizes)]
        memory = memoryview(mmap.mmap(-1, sum(sizes) + 4096))[offset:]
        ends = list(itertools.accumulate(sizes))
        buffers = [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.forget(path)
        with LocalMedium(str(path.parent)).open(path.name) as reader:
            assert not reader.is_in_memory(start, sum(sizes))
            assert reader.fill(start, buffers) == len(wanted)
        assert bytes(memory[: len(wanted)]) == wanted

    @pytest.mark.usefixtures("is_told")
    def test_what_is_in_memory_is_told(self, path: Path) -> None:
        assert self.share(path, 4096, 8192) == 1.0
        self.forget(path)
        assert self.share(path, 4096, 8192) == 0.0
        assert self.share(path, 1 << 20, 8192) == 0.0
        assert self.share(path, 0, 0) is None

    def test_who_is_not_told_reads_in_the_usual_way(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(page_cache, "_CACHESTAT", 10_000)
        assert self.share(path, 0, 4096) is None
        monkeypatch.setattr(local_medium, "_open_direct", lambda _: pytest.fail("opened"))
        self.check_reads(path, 4096, [8192, 4096])

    @pytest.mark.usefixtures("is_told")
    def test_it_leaves_nothing_behind(self, path: Path) -> None:
        self.check_reads(path, 8192, [4096, 8192, 4096])
        assert self.share(path, 8192, 16384) == 0.0

    @pytest.mark.parametrize("start", [4096 * 60, 4096 * 64, 4096 * 70])
    def test_the_end_of_the_file(self, path: Path, start: int) -> None:
        self.check_reads(path, start, [8192] * 3)

    @pytest.mark.parametrize(
        ("start", "sizes", "offset"),
        [(4096, [4096, 100], 0), (100, [4096], 0), (4096, [4096, 8192], 1), (0, [1, 4095], 0)],
        ids=["odd size", "odd start", "odd address", "odd sizes"],
    )
    def test_what_it_cannot_do_is_read_in_the_usual_way(
        self, path: Path, start: int, sizes: list[int], offset: int
    ) -> None:
        self.check_reads(path, start, sizes, offset)

    @pytest.mark.parametrize("refusing", ["open", "preadv"])
    def test_a_disk_that_refuses_it(
        self, path: Path, refusing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        operation, num_refused = getattr(os, refusing), []
        directs: set[int] = set()

        def refuse(*args: Any) -> Any:
            is_direct = args[1] & os.O_DIRECT if refusing == "open" else args[0] in directs
            if is_direct:
                num_refused.append(1)
                raise OSError(errno.EINVAL, "not here")
            return operation(*args)

        def note(descriptor: int) -> int | None:
            direct = open_direct(descriptor)
            directs.update(() if direct is None else (direct,))
            return direct

        open_direct = local_medium._open_direct
        monkeypatch.setattr(page_cache, "share_in_memory", lambda *_: 0.0)
        monkeypatch.setattr(local_medium, "_open_direct", note)
        monkeypatch.setattr(os, refusing, refuse)
        self.check_reads(path, 4096, [8192, 4096])
        assert len(num_refused) == 1

    def test_other_errors_are_not_hidden(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(page_cache, "share_in_memory", lambda *_: 0.0)
        with LocalMedium(str(path.parent)).open(path.name) as reader:
            assert not reader.is_in_memory(0, 4096)
            monkeypatch.setattr(os, "preadv", fail)
            with pytest.raises(OSError, match="broken"):
                reader.fill(0, [memoryview(bytearray(4096))])
