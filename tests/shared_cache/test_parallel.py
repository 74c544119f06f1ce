"""Jobs of one batch: all are done, errors reach the caller, and nobody waits for busy helpers."""

import threading
from collections.abc import Callable, Iterator

import pytest

from shared_cache import parallel
from shared_cache.parallel import ask_all, run_all
from shared_cache.threads import IoThreads
from tests.shared_cache.fakes import WAIT_S


@pytest.fixture(params=[0, 2])
def num_helpers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """With and without helper threads, as on a machine with one core."""
    threads = IoThreads(request.param, "test-helpers") if request.param else None
    monkeypatch.setattr(parallel, "_num_helpers", lambda: request.param)
    monkeypatch.setattr(parallel, "_helpers", lambda process_id, num_threads, name: threads)
    yield request.param
    if threads is not None:
        assert threads.close(WAIT_S)


def returning(value: int) -> Callable[[], int]:
    return lambda: value


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 50])
def test_results_come_in_order(num_helpers: int, num_jobs: int) -> None:
    assert run_all(returning(index) for index in range(num_jobs)) == list(range(num_jobs))


def test_helpers_and_the_caller_work_at_the_same_time(num_helpers: int) -> None:
    num_jobs = num_helpers + 1
    meeting = threading.Barrier(num_jobs)

    def meet() -> str:
        meeting.wait(WAIT_S)
        return threading.current_thread().name

    names = run_all([meet] * num_jobs)
    assert len(set(names)) == num_jobs
    assert threading.current_thread().name in names


def test_an_error_reaches_the_caller_when_nothing_runs_any_more(num_helpers: int) -> None:
    done: list[int] = []

    def fail() -> int:
        raise OSError("no")

    def note(index: int) -> Callable[[], int]:
        return lambda: done.append(index) or index  # type: ignore[func-returns-value]

    with pytest.raises(OSError, match="no"):
        run_all([note(0), fail, *(note(index) for index in range(1, 1000))])
    num_done = len(done)
    assert num_done < 1000
    assert run_all([returning(7)]) == [7]
    assert len(done) == num_done


def test_batches_inside_batches_end(num_helpers: int) -> None:
    def inner() -> int:
        return sum(run_all(returning(index) for index in range(10)))

    assert run_all([inner] * 8) == [45] * 8


def test_nobody_waits_for_helpers_that_hang(num_helpers: int) -> None:
    gate, all_held = threading.Event(), threading.Semaphore(0)

    def hang() -> int:
        all_held.release()
        assert gate.wait(WAIT_S)
        return 1

    with_hanging = threading.Thread(target=lambda: run_all([hang] * (num_helpers + 1)))
    with_hanging.start()
    try:
        for _ in range(num_helpers + 1):
            assert all_held.acquire(timeout=WAIT_S)
        assert run_all(returning(index) for index in range(5)) == list(range(5))
    finally:
        gate.set()
        with_hanging.join(WAIT_S)


def test_questions_wait_side_by_side_on_any_number_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "_num_helpers", lambda: 0)
    all_wait = threading.Barrier(parallel.ASKING_HELPERS + 1)

    def ask() -> str:
        all_wait.wait(WAIT_S)
        return threading.current_thread().name

    assert len(set(ask_all([ask] * all_wait.parties))) == all_wait.parties


def test_nothing_piles_up_behind_helpers_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, gate = IoThreads(parallel.ASKING_HELPERS, "test-ask"), threading.Event()
    monkeypatch.setattr(parallel, "_helpers", lambda process_id, num_threads, name: threads)
    all_hang = threading.Barrier(parallel.ASKING_HELPERS + 1)
    try:
        for _ in range(parallel.ASKING_HELPERS):
            threads.submit(lambda: (all_hang.wait(WAIT_S), gate.wait(WAIT_S)))
        all_hang.wait(WAIT_S)
        for _ in range(50):
            assert ask_all([lambda: 1] * 8) == [1] * 8
        assert threads.num_queued <= parallel.ASKING_HELPERS
    finally:
        gate.set()
        assert threads.close(WAIT_S)
