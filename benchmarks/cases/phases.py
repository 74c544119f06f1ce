"""Where the time of a thread goes: callables are wrapped from outside, each counted as a phase.

The product must not carry clocks for a benchmark, and a profiler for every call is too slow for
turns of milliseconds. So a few callables, found by name, are replaced by ones that note what they
took, less what other wrapped ones took inside them. Wall time above CPU time, in a phase that waits
for nothing, is waiting for the interpreter's lock or for a core.
"""

import functools
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

OUTSIDE = "outside"
"""The phase of a thread while it is in no wrapped callable."""

OnEnter = Callable[["ThreadTimes"], None]


@dataclass(slots=True)
class Spent:
    """What one phase took: how often it was entered, seconds of the clock and of the thread."""

    calls: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, other: "Spent") -> None:
        self.calls += other.calls
        self.wall_s += other.wall_s
        self.cpu_s += other.cpu_s

    def figures(self, per: float) -> dict[str, float]:
        """Calls and milliseconds for each of `per` rounds; `off_cpu_ms` is what it waited."""
        return {
            "calls": round(self.calls / per, 2),
            "wall_ms": round(self.wall_s / per * 1000, 4),
            "cpu_ms": round(self.cpu_s / per * 1000, 4),
            "off_cpu_ms": round((self.wall_s - self.cpu_s) / per * 1000, 4),
        }


class ThreadTimes:
    """The phases of one thread; only that thread enters and leaves."""

    def __init__(self) -> None:
        self.name = threading.current_thread().name
        self.began_s = self._wall_s = time.perf_counter()
        self._cpu_s = time.thread_time()
        self._stack = [OUTSIDE]
        self._spent: defaultdict[str, Spent] = defaultdict(Spent)

    def enter(self, phase: str) -> None:
        self._charge()
        self._stack.append(phase)
        self._spent[phase].calls += 1

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def take(self) -> dict[str, Spent]:
        """What was spent since the last time, which began at `began_s` of the clock."""
        self._charge()
        spent, self._spent = self._spent, defaultdict(Spent)
        self.began_s = self._wall_s
        return dict(spent)

    @property
    def spent(self) -> dict[str, Spent]:
        """What was spent up to the last time that a phase began or ended; for any thread."""
        return dict(self._spent)

    def _charge(self) -> None:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        spent = self._spent[self._stack[-1]]
        spent.wall_s += wall_s - self._wall_s
        spent.cpu_s += cpu_s - self._cpu_s
        self._wall_s, self._cpu_s = wall_s, cpu_s


class Phases:
    """Wraps callables; notes what they take while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self._own = threading.local()
        self._threads: list[ThreadTimes] = []

    def wrapped(
        self, call: Callable[..., Any], phase: str, on_enter: OnEnter | None = None
    ) -> Callable[..., Any]:
        """`call`, counted as `phase`; `on_enter` is called before, with the thread's times."""

        @functools.wraps(call)
        def counted(*args: Any, **named: Any) -> Any:
            if not self.is_on:
                return call(*args, **named)
            times = self._of_this_thread()
            if on_enter is not None:
                on_enter(times)
            times.enter(phase)
            try:
                return call(*args, **named)
            finally:
                times.leave()

        return counted

    def take(self) -> dict[str, Spent]:
        """What all threads have spent since the last time, each phase in one sum.

        To be called when no wrapped callable runs.
        """
        total: defaultdict[str, Spent] = defaultdict(Spent)
        self._own, threads, self._threads = threading.local(), self._threads, []
        for times in threads:
            for phase, spent in times.spent.items():
                total[phase].add(spent)
        return dict(total)

    def _of_this_thread(self) -> ThreadTimes:
        times: ThreadTimes | None = getattr(self._own, "times", None)
        if times is None:
            times = self._own.times = ThreadTimes()
            self._threads.append(times)
        return times


@dataclass(frozen=True, slots=True)
class Place:
    """Where a callable is looked up: an attribute of a class or of a module."""

    owner: Any
    name: str

    def get(self) -> Any:
        return vars(self.owner)[self.name]

    def set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


def places(name: str, packages: Sequence[str]) -> list[Place]:
    """Where loaded modules of `packages` look up `name`, `Class.method` or a function.

    A function is replaced in every module that has imported it. Empty where there is none.
    """
    first, _, method = name.partition(".")
    found: list[Place] = []
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(tuple(packages)) or first not in vars(module):
            continue
        if not method:
            found.append(Place(module, first))
        elif method in vars(owner := vars(module)[first]) and Place(owner, method) not in found:
            found.append(Place(owner, method))
    return found


@contextmanager
def replaced(replacements: Sequence[tuple[Place, Any]]) -> Iterator[None]:
    """These attributes have other values in the block."""
    before = [(place, place.get()) for place, _ in replacements]
    try:
        for place, value in replacements:
            place.set(value)
        yield
    finally:
        for place, value in before:
            place.set(value)


def print_phases(title: str, figures: dict[str, dict[str, float]]) -> None:
    """One line for each phase, the longest first."""
    print(f"\n{title}")
    columns = list(dict.fromkeys(name for one in figures.values() for name in one))
    print(f"{'':34}" + "".join(f"{name:>14}" for name in columns))
    for phase, one in sorted(figures.items(), key=lambda item: -item[1].get("wall_ms", 0.0)):
        cells = "".join(f"{one[name]:14.3f}" if name in one else " " * 14 for name in columns)
        print(f"{phase:34}{cells}")
