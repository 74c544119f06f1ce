"""What a look at an installation or a running cluster found, one line a thing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; a text that is not `ok` says what to do."""

    name: str
    state: State
    text: str


Probe = Callable[[], Finding]


def run_probes(probes: dict[str, Probe]) -> Iterator[Finding]:
    """The findings one after the other; a probe that raises is a failure, and not the last one."""
    for name, probe in probes.items():
        try:
            yield probe()
        except Exception as error:  # noqa: PERF203  # each probe by itself
            yield Finding(name, "fail", f"{type(error).__name__}: {error}")
