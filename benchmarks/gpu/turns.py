"""Where the time of an engine's turn goes, on the device and on the engine's thread.

The engine's callables are wrapped from outside and counted by phase, each without the phases within
it: alone at batch 1 and at `--running`, and while other requests' long prompts are found on the
device or loaded from host memory, as in `benchmarks.gpu.itl`. Wall time above CPU time, where
nothing waits for the device, is waiting for the interpreter's lock. The slowest turns are told
apart: they are what the p99 between tokens is made of.

    python -m benchmarks.gpu.turns --json FILE
"""

import argparse
import asyncio
import copy
import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

import actors.engines.torch as engine_package
from actors.replica import EngineReplica
from benchmarks.cases.phases import (
    OUTSIDE,
    Phases,
    Place,
    Spent,
    ThreadTimes,
    places,
    print_phases,
    replaced,
)
from benchmarks.gpu.itl import Traffic, add_arguments, replica_for, run, saved_prompts, traffic
from benchmarks.gpu.workbench import GPU, arguments, device, percentile, report

TURN = "TurnLoop.turn"
"""Each call of it begins a turn, which goes on until the next call."""

PHASES = {
    "turn, the rest": (TURN,),
    "deciding": ("Scheduler.decide",),
    "connector: match": ("ConnectorDriver.match", "ConnectorDriver.allocated"),
    "connector: begin": ("ConnectorDriver.begin_pass",),
    "connector: end": (
        "ConnectorDriver.end_pass",
        "ConnectorDriver.end_turn",
        "ConnectorDriver.finished",
    ),
    "packing the batch": ("_batch",),
    "page tables, host inputs": ("page_tables", "host_inputs"),
    "plan": ("FlashInferAttention.plan",),
    "replay of a graph": ("CUDAGraph.replay",),
    "layers launched one by one": ("FusedDecoder.hidden",),
    "output layer": ("logits_of",),
    "pass, the rest": ("CudaForward.logits", "PlainForward.logits"),
    "choosing, waiting for device": ("LaunchedPass.choices",),
    "runner, the rest": ("Runner.launch", "Runner._launch"),
    "recording": ("TurnLoop._record_or_fail",),
    "making chunks": ("ActiveRequest.take",),
    "sending chunks": ("TurnLoop._send",),
    "inbox": ("Inbox.take",),
}
"""Callables of the engine by phase, `Class.method` or a module's function.

A name that is not there is left out and told; so this is what to change when the engine changes.
"""

DEVICE_SPANS = {
    "graph": "CUDAGraph.replay",
    "layers one by one": "FusedDecoder.hidden",
    "output layer": "logits_of",
    "whole pass, gaps counted": "CudaForward.logits",
}
"""What is put on the device by these is timed there, too, by events before and behind."""

PACKAGES = ("actors.engines.torch", "actors.engines.channel", "torch.cuda")
SLOW_PERCENT = 98
"""Turns beyond this percentile of their length are the slow ones."""

BETWEEN = "between turns, the rest"


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """One turn of the engine's thread: when it began, and the process's CPU time at its end."""

    began_s: float
    process_cpu_s: float
    spent: dict[str, Spent]

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.spent.values())


class TurnRecorder:
    """Notes turns and what they put on the device, while `phases.is_on`."""

    def __init__(self) -> None:
        self.phases = Phases()
        self.turns: list[TurnTimes] = []
        self.missing: list[str] = []
        self._spans: list[tuple[str, float, Any, Any]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The engine's callables are wrapped in the block; make the engine in it."""
        for module in pkgutil.walk_packages(engine_package.__path__, f"{engine_package.__name__}."):
            importlib.import_module(module.name)
        replacements: list[tuple[Place, Any]] = []
        for phase, names in PHASES.items():
            for name in names:
                found = places(name, PACKAGES)
                self.missing += [] if found else [name]
                replacements += [(place, self._wrapped(place, phase, name)) for place in found]
        if TURN in self.missing:
            raise SystemExit(f"there is no {TURN}: say in {__name__} what a turn is")
        with replaced(replacements):
            yield

    def start(self) -> None:
        self.turns.clear()
        self._spans.clear()
        self.phases.is_on = True

    def stop(self) -> None:
        self.phases.is_on = False

    def device_ms(self, first_s: float, end_s: float) -> dict[str, list[float]]:
        """Milliseconds on the device of each span that was put there between these times."""
        if self._spans:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, at_s, start, end in self._spans:
            if first_s <= at_s <= end_s:
                found.setdefault(name, []).append(start.elapsed_time(end))
        return found

    def _wrapped(self, place: Place, phase: str, name: str) -> Callable[..., Any]:
        call = place.get()
        for span, spanned in DEVICE_SPANS.items():
            if spanned == name and device() == GPU:
                call = self._on_device(call, span)
        on_enter = self._next_turn if name == TURN else None
        return self.phases.wrapped(call, phase, on_enter)

    def _next_turn(self, times: ThreadTimes) -> None:
        began_s = times.began_s
        self.turns.append(TurnTimes(began_s, time.process_time(), times.take()))

    def _on_device(self, call: Callable[..., Any], span: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            if not self.phases.is_on:  # while a graph is captured, for one
                return call(*args, **named)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            at_s = time.perf_counter()
            start.record()
            result = call(*args, **named)
            end.record()
            self._spans.append((span, at_s, start, end))
            return result

        return timed


@dataclass(slots=True)
class Found:
    """All turns of some rounds of one kind, while all running requests decoded."""

    turns: list[TurnTimes]
    others_cpu_s: float
    device_ms: dict[str, list[float]]
    between_tokens: list[dict[str, Any]]

    def add(self, recorder: TurnRecorder, seen: Traffic) -> None:
        first, *turns = [one for one in recorder.turns if seen.first_s <= one.began_s <= seen.end_s]
        own_s = sum(one.cpu_s for turn in turns for one in turn.spent.values())
        self.turns += turns
        self.others_cpu_s += turns[-1].process_cpu_s - first.process_cpu_s - own_s
        for name, values in recorder.device_ms(seen.first_s, seen.end_s).items():
            self.device_ms.setdefault(name, []).extend(values)
        self.between_tokens.append(seen.figures())

    def figures(self) -> dict[str, Any]:
        lengths_ms = [turn.wall_s * 1000 for turn in self.turns]
        limit_ms = percentile(lengths_ms, SLOW_PERCENT)
        slow = [turn for turn in self.turns if turn.wall_s * 1000 >= limit_ms]
        phases, slow_phases = by_phase(self.turns), by_phase(slow)
        for name, one in phases.items():
            one["slow_wall_ms"] = slow_phases.get(name, {}).get("wall_ms", 0.0)
            one["slow_cpu_ms"] = slow_phases.get(name, {}).get("cpu_ms", 0.0)
        num_turns = len(self.turns)
        medians = {
            name: statistics.median(one[name] for one in self.between_tokens)
            for name in self.between_tokens[0]
        }
        return {
            "turns": num_turns,
            "turn_ms": {
                "median": statistics.median(lengths_ms),
                "mean": statistics.mean(lengths_ms),
                "p99": percentile(lengths_ms, 99),
            },
            "cpu_ms": sum(one["cpu_ms"] for one in phases.values()),
            "cpu_ms_of_other_threads": self.others_cpu_s / num_turns * 1000,
            "device_ms": {
                name: {"median": statistics.median(each), "per_turn": sum(each) / num_turns}
                for name, each in self.device_ms.items()
            },
            "phases": phases,
            "between_tokens": medians,
        }


def by_phase(turns: Sequence[TurnTimes]) -> dict[str, dict[str, float]]:
    """Means for each turn."""
    total: dict[str, Spent] = {}
    for turn in turns:
        for name, spent in turn.spent.items():
            total.setdefault(BETWEEN if name == OUTSIDE else name, Spent()).add(spent)
    return {name: spent.figures(len(turns)) for name, spent in total.items()}


async def measure(
    recorder: TurnRecorder, options: argparse.Namespace, replica: EngineReplica
) -> dict[str, Any]:
    """Rounds of all kinds in turn; the first round of all does not count."""
    prompts = await saved_prompts(replica, options)
    single = copy.copy(options)
    single.running = 1
    kinds = {
        "batch 1": (single, []),
        "alone": (options, []),
        "device": (options, prompts[:1]),
        "loads": (options, prompts),
    }
    found = {name: Found([], 0.0, {}, []) for name in kinds}
    await traffic(replica, options, 1, prompts)
    for index in range(options.rounds):
        for number, (name, (asked, intruding)) in enumerate(kinds.items()):
            recorder.start()
            seen = await traffic(replica, asked, 1000 * (index + 1) + 100 * number, intruding)
            recorder.stop()
            found[name].add(recorder, seen)
    return {name: one.figures() for name, one in found.items()}


def show(name: str, found: dict[str, Any]) -> None:
    turn, tokens = found["turn_ms"], found["between_tokens"]
    spans = {span: round(one["median"], 3) for span, one in found["device_ms"].items()}
    title = (
        f"{name}: {found['turns']} turns, median {turn['median']:.2f} ms, p99 {turn['p99']:.2f}; "
        f"between tokens p99 {tokens['p99_ms']:.2f}; CPU of this thread {found['cpu_ms']:.2f}, of "
        f"others {found['cpu_ms_of_other_threads']:.2f} a turn; device {spans}"
    )
    print_phases(title, found["phases"])


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    add_arguments(parser)
    parser.set_defaults(rounds=2)
    options = parser.parse_args()
    recorder = TurnRecorder()
    with replica_for(options, "turns") as config, recorder.installed():
        found = asyncio.run(run(config, partial(measure, recorder, options)))
    for name, figures in found.items():
        show(name, figures)
    print("\nnot there:", *recorder.missing)
    report({"turns": found, "not_there": recorder.missing}, options.json)


if __name__ == "__main__":
    main()
