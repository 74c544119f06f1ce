"""A store that is full, read-only, away or misnamed: one clear error, and nothing lost."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry, known_implementations

from shared_cache.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)
from shared_cache.stores.fs_store import FsBlockStore, open_store
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fake_file_systems import FaultyObjects
from tests.shared_cache.fakes import NAMESPACE, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all


class ClientLibraryError(Exception):
    """Stands for the types that object stores' own libraries raise."""


@pytest.fixture(autouse=True)
def fake_protocols() -> Iterator[None]:
    with fake_file_systems.registered():
        yield


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the named operations of `faulty://` raise an error from now on."""

    def arrange(error: Exception, *operations: str) -> None:
        def before(operation: str) -> None:
            if operation in operations:
                raise error

        monkeypatch.setattr(FaultyObjects, "before", staticmethod(before))

    return arrange


@pytest.fixture
def full(
    faulty: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], None]:
    """Makes the medium of a protocol full: a write stops half-way with the given errno."""

    def arrange(protocol: str, code: int) -> None:
        error = OSError(code, os.strerror(code))
        pwritev = os.pwritev

        def fail(descriptor: int, buffers: list[memoryview], position: int) -> int:
            raise error

        def write_some(descriptor: int, buffers: list[memoryview], position: int) -> int:
            monkeypatch.setattr(os, "pwritev", fail)
            return pwritev(descriptor, [buffers[0][: buffers[0].nbytes // 2]], position)

        if protocol == "file":
            monkeypatch.setattr(os, "pwritev", write_some)
        elif protocol == "mounted":
            monkeypatch.setattr(fake_file_systems.PlainWriter, "write", write_then_fail(error))
        else:
            faulty(error, "write")

    return arrange


def write_then_fail(error: Exception) -> Callable[..., int]:
    def write(self: fake_file_systems.PlainWriter, data: memoryview) -> int:
        self.file.write(data[: data.nbytes // 2])
        raise error

    return write


def objects(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url)
    return [path for path in fs.find(root) if not path.endswith("namespace.json")]


@pytest.mark.parametrize("protocol", ["file", "mounted", "faulty"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_store_shows_nothing_half(
    protocol: str,
    code: int,
    full: Callable[[str, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store(f"{protocol}://{tmp_path}/store", NAMESPACE)
    stored, lost = chain_of(2), chain_of(3, first_token=90)
    store.write(run_of(stored))
    full(protocol, code)
    with pytest.raises(StoreFullError, match="no room left"):
        store.write(run_of(lost))
    assert len(objects(store.url)) == 1
    assert store.match(lost.hashes) == 0
    assert read_all(store, stored.hashes) == payloads_of(stored.hashes)
    monkeypatch.undo()
    assert store.write(run_of(lost)) == 3


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files are allocated before they are written."""
    store = open_store(f"file://{tmp_path}", NAMESPACE)
    store._medium._allocates_ahead = True

    def refuse(descriptor: int, start: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        patch.setattr(os, "pwritev", lambda *_: pytest.fail("written"))
        with pytest.raises(StoreFullError, match="no room left"):
            store.write(run_of(chain_of(3)))
    assert not list(tmp_path.rglob("*.tmp"))
    assert store.write(run_of(chain_of(3))) == 3


@pytest.mark.parametrize("protocol", ["file", "mounted", "faulty"])
def test_a_full_store_opens_for_reading(
    protocol: str, full: Callable[[str, int], None], tmp_path: Path
) -> None:
    url, chain = f"{protocol}://{tmp_path}/store", chain_of(2)
    open_store(url, NAMESPACE).write(run_of(chain))
    full(protocol, errno.ENOSPC)
    store = open_store(url, NAMESPACE)
    assert not store.read_only
    assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


def forbid_local_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As a read-only mount does. (Mode bits would not stop a test that runs as root.)"""
    open_file = os.open

    def open_to_read(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), path)
        return open_file(path, flags, mode)

    def refuse(path: str, *_: object) -> None:
        if not os.path.isdir(path):
            raise OSError(code, os.strerror(code), path)
        raise FileExistsError(path)

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "mkdir", refuse)


class TestReadOnly:
    def check_reads_only(self, store: FsBlockStore) -> None:
        chain = chain_of(3)
        assert store.read_only
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
        assert len(list(store.entries())) == 1
        with pytest.raises(StoreReadOnlyError, match="read-only"):
            store.write(run_of(chain_of(2, first_token=90)))

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
    def test_a_local_folder(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"file://{tmp_path}/store"
        open_store(url, NAMESPACE).write(run_of(chain_of(3)))
        forbid_local_writes(monkeypatch, code)
        self.check_reads_only(open_store(url, NAMESPACE))

    @pytest.mark.parametrize(
        "error",
        [PermissionError("AccessDenied"), NotImplementedError(), OSError(errno.EROFS, "ro")],
    )
    def test_an_object_store(self, error: Exception, faulty: Callable[..., None]) -> None:
        open_store("faulty:///a", NAMESPACE).write(run_of(chain_of(3)))
        faulty(error, "write", "remove")
        self.check_reads_only(open_store("faulty:///a", NAMESPACE))

    def test_damage_in_it_is_a_miss_and_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url, chain = f"file://{tmp_path}/store", chain_of(3)
        open_store(url, NAMESPACE).write(run_of(chain))
        (path,) = objects(url)
        os.truncate(path, 4096 + 70)
        forbid_local_writes(monkeypatch, errno.EROFS)
        store = open_store(url, NAMESPACE)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:1])
        assert store.faults.corrupt == 1
        assert objects(url) == [path]

    def test_a_damaged_head_in_it_is_counted_each_time_and_logged_once(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        url, chain = f"file://{tmp_path}/store", chain_of(3)
        open_store(url, NAMESPACE).write(run_of(chain))
        (path,) = objects(url)
        os.truncate(path, 600)
        forbid_local_writes(monkeypatch, errno.EROFS)
        store = open_store(url, NAMESPACE)
        caplog.clear()
        for _ in range(5):
            assert store.match(chain.hashes) == 0
        assert store.faults.corrupt == 5
        assert len(caplog.records) == 1
        assert path.endswith(caplog.messages[0].split()[2])

    def test_a_folder_that_cannot_be_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forbid_local_writes(monkeypatch, errno.EROFS)
        with pytest.raises(StoreReadOnlyError, match="does not exist and may not be created"):
            open_store(f"file://{tmp_path}/store", NAMESPACE)

    def test_becoming_read_only_while_open(self, faulty: Callable[..., None]) -> None:
        store = open_store("faulty:///a", NAMESPACE)
        faulty(PermissionError("AccessDenied"), "write")
        with pytest.raises(StoreReadOnlyError, match="permission to write"):
            store.write(run_of(chain_of(1)))


AWAY = [
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    TimeoutError("slow"),
    OSError(errno.EIO, "I/O error"),
    OSError(errno.ESTALE, "stale handle"),
    ClientLibraryError("EndpointConnectionError"),
]


class TestUnavailable:
    @pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
    def test_at_start(self, error: Exception, faulty: Callable[..., None]) -> None:
        faulty(error, "read", "write", "list")
        with pytest.raises(StoreUnavailableError, match="check the address") as caught:
            open_store("faulty:///a", NAMESPACE)
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
    def test_later(self, error: Exception, faulty: Callable[..., None]) -> None:
        chain, other = chain_of(2), chain_of(2, first_token=90)
        store = open_store("faulty:///a", NAMESPACE)
        store.write(run_of(chain))
        faulty(error, "read", "write", "list", "remove")
        for operation in (
            lambda: store.match(other.hashes),
            lambda: read_all(store, chain.hashes),
            lambda: store.write(run_of(other)),
            lambda: list(store.entries()),
            lambda: store.delete(f"ab/ab{'0' * 62}.arrow"),
        ):
            with pytest.raises(StoreUnavailableError):
                operation()
        faulty(error)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
        assert store.faults.corrupt == 0

    def test_a_bucket_that_does_not_exist(self, faulty: Callable[..., None]) -> None:
        faulty(FileNotFoundError("NoSuchBucket"), "read", "write")
        with pytest.raises(StoreUnavailableError, match="create it"):
            open_store("faulty:///a", NAMESPACE)

    def test_no_permission_to_read(self, faulty: Callable[..., None]) -> None:
        store = open_store("faulty:///a", NAMESPACE)
        faulty(PermissionError("AccessDenied"), "read")
        with pytest.raises(StoreError, match="permission to read") as caught:
            store.match(chain_of(1).hashes)
        assert not isinstance(caught.value, StoreReadOnlyError)

    def test_a_bug_is_not_taken_for_a_fault_of_the_store(self, faulty: Callable[..., None]) -> None:
        store = open_store("faulty:///a", NAMESPACE)
        faulty(AttributeError("a bug"), "read")
        with pytest.raises(AttributeError):
            store.match(chain_of(1).hashes)


class TestWrongSettings:
    @pytest.mark.parametrize("url", ["nosuch://bucket", "", "  ", "s4://x/y"])
    def test_a_url_that_means_nothing(self, url: str) -> None:
        with pytest.raises(ConfigError, match="give a URL that fsspec knows"):
            open_store(url, NAMESPACE)

    def test_s3_without_its_back_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = {"class": "kvcommons_no_such_module.S3", "err": "Install s3fs"}
        monkeypatch.setitem(known_implementations, "s3", missing)
        monkeypatch.delitem(_registry, "s3", raising=False)
        monkeypatch.setitem(sys.modules, "obstore", None)
        monkeypatch.delitem(sys.modules, "shared_cache.media.object_medium", raising=False)
        with pytest.raises(ConfigError, match=r"pip install 'kvcommons\[s3\]'"):
            open_store("s3://bucket/folder", NAMESPACE)

    def test_another_missing_back_end_says_what_fsspec_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = {"class": "kvcommons_no_such_module.X", "err": "Please install xyzfs"}
        monkeypatch.setitem(known_implementations, "xyz", missing)
        with pytest.raises(ConfigError, match="Please install xyzfs"):
            open_store("xyz://bucket", NAMESPACE)

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for url in (f"file://{tmp_path}/file", f"mounted://{tmp_path}/file"):
            with pytest.raises(ConfigError, match="needs a folder"):
                open_store(url, NAMESPACE)

    def test_an_option_that_the_file_system_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: FaultyObjects, **options: object) -> None:
            raise TypeError("unexpected keyword argument 'regoin'")

        monkeypatch.setattr(FaultyObjects, "__init__", refuse)
        with pytest.raises(ConfigError, match="regoin"):
            open_store("faulty:///a", NAMESPACE, {"regoin": "x"})
