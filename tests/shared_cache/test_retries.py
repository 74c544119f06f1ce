"""Another try where it may help, in time and counted; none where it cannot."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_cache.errors import StoreFullError
from shared_cache.media.fsspec_media import ObjectMedium, RenamingMedium
from shared_cache.media.io_errors import RequestRefusedError
from shared_cache.media.medium import Medium
from shared_cache.media.retries import Retries, RetryPolicy
from tests.shared_cache import fake_file_systems
from tests.shared_cache.fake_file_systems import FaultyObjects, MountedFileSystem, PlainFile
from tests.shared_cache.fakes import FakeClock

POLICY = RetryPolicy(max_tries=4, first_pause_s=1.0, longest_pause_s=3.0)


class Client:
    """Makes tries under a clock that only its pauses and operations move."""

    def __init__(self, timeout_s: float = 100.0) -> None:
        self.clock = FakeClock()
        self.pauses_s: list[float] = []
        self.retries = Retries(timeout_s, POLICY, self.clock, self._sleep, chance=lambda: 1.0)

    def _sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        self.clock.now_s += pause_s

    def run(self, errors: list[Exception], takes_s: float = 0.0) -> list[float]:
        """Fail with `errors`, one a try, then succeed; the seconds that each try was given."""
        given_s: list[float] = []

        def operation(left_s: float) -> list[float]:
            given_s.append(left_s)
            self.clock.now_s += takes_s
            if errors:
                raise errors.pop(0)
            return given_s

        return self.retries.run(operation)


@given(st.integers(1, 50), st.floats(0, 1))
def test_pauses_grow_to_a_limit_and_differ(num_tries: int, chance: float) -> None:
    policy = RetryPolicy(first_pause_s=0.1, longest_pause_s=2.0)
    whole_s = min(0.1 * 2 ** (num_tries - 1), 2.0)
    assert whole_s / 2 <= policy.pause_s(num_tries, chance) <= whole_s
    assert policy.pause_s(num_tries, 0.0) < policy.pause_s(num_tries, 1.0)


def test_what_passes_is_tried_again_and_counted() -> None:
    client = Client()
    assert client.run([ConnectionError(), TimeoutError()]) == [100.0, 99.0, 97.0]
    assert client.pauses_s == [1.0, 2.0]
    assert client.retries.num_retries == 2
    assert client.run([]) == [100.0]
    assert client.retries.num_retries == 2


def test_it_gives_up_after_so_many_tries() -> None:
    client, errors = Client(), [ConnectionError(str(number)) for number in range(9)]
    with pytest.raises(ConnectionError, match="3"):
        client.run(errors)
    assert client.pauses_s == [1.0, 2.0, 3.0]


def test_no_try_begins_after_the_deadline() -> None:
    client = Client(timeout_s=10.0)
    with pytest.raises(TimeoutError):
        client.run([TimeoutError(), TimeoutError(), TimeoutError()], takes_s=4.0)
    assert client.pauses_s == [1.0]
    assert client.clock.now_s <= 1000.0 + 10.0


class LibraryError(Exception):
    """Stands for the types that object stores' own libraries raise."""


PASSING: list[Exception] = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("slow"),
    OSError(errno.EIO, "I/O error"),
    OSError(errno.EBUSY, "SlowDown"),
    LibraryError("EndpointConnectionError"),
]
FINAL: list[Exception] = [
    FileNotFoundError("NoSuchKey"),
    PermissionError("AccessDenied"),
    FileExistsError("there"),
    OSError(errno.ENOSPC, "full"),
    NotImplementedError("conditional put"),
    RequestRefusedError("wrong region"),
    StoreFullError("full"),
    TypeError("a bug"),
    KeyError("a bug"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_errors_that_may_pass(error: Exception) -> None:
    assert len(Client().run([error])) == 2


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_errors_that_stay(error: Exception) -> None:
    client = Client()
    with pytest.raises(type(error)):
        client.run([error])
    assert client.retries.num_retries == 0


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Medium, Callable[[str], None]]]:
    """A fake object store, and how to let its next operation of a kind fail."""
    with fake_file_systems.registered():
        failing: list[str] = []

        def before(operation: str) -> None:
            if operation in failing:
                failing.remove(operation)
                raise TimeoutError(operation)

        monkeypatch.setattr(FaultyObjects, "before", staticmethod(before))
        yield ObjectMedium(FaultyObjects(), "/folder"), failing.append


def test_each_operation_of_an_object_store(
    objects: tuple[Medium, Callable[[str], None]],
) -> None:
    medium, fail_once = objects
    fail_once("write")
    assert medium.publish("a", [memoryview(b"abc")])
    fail_once("read")
    with medium.open("a") as reader:
        assert reader.read(1, 9) == b"bc"
    fail_once("list")
    assert [item[:2] for item in medium.list()] == [("a", 3)]
    fail_once("remove")
    medium.remove("a")
    assert list(medium.list()) == []
    assert medium.num_retries == 4


def test_an_object_is_not_replaced_unasked(objects: tuple[Medium, Callable[[str], None]]) -> None:
    medium, _ = objects
    assert medium.publish("a", [memoryview(b"first")])
    assert not medium.publish("a", [memoryview(b"second")])
    with medium.open("a") as reader:
        assert reader.read(0, 9) == b"first"
    assert medium.publish("a", [memoryview(b"third")], replace=True)
    with medium.open("a") as reader:
        assert reader.read(0, 9) == b"third"


def test_a_file_is_opened_anew_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    files: list[Any] = []
    read = PlainFile.read

    def fail_first(self: PlainFile, num_bytes: int = -1) -> bytes:
        if self not in files:
            files.append(self)
        if len(files) == 1:
            raise OSError(errno.ESTALE, "stale handle")
        return read(self, num_bytes)

    monkeypatch.setattr(PlainFile, "read", fail_first)
    medium, buffer = RenamingMedium(MountedFileSystem(), str(tmp_path)), bytearray(5)
    with medium.open("a") as reader:
        assert reader.fill(3, [memoryview(buffer)]) == 5
    assert bytes(buffer) == b"34567"
    assert len(files) == 2
    assert medium.num_retries == 1
