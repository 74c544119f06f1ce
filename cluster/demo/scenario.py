"""What every scenario is given: configuration, prompts, sizes, a screen, and a way to serve.

The scenarios know nothing of Ray: `Serving` is all they see of a running cluster.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.config import ModelSource
from actors.engine import GenerationRequest, SamplingParams
from actors.replica_health import ReplicaStats
from cluster.config import ClusterConfig
from cluster.demo.asking import Asks
from cluster.demo.console import Screen
from cluster.demo.prompts import Prompts
from cluster.demo.report import ScenarioResult
from cluster.demo.sizes import Sizes


class Serving(Protocol):
    """A running cluster, as a scenario sees it."""

    @property
    def dispatcher(self) -> Asks:
        """Where requests go."""

    async def stats(self) -> tuple[ReplicaStats, ...]:
        """One snapshot for each replica."""

    async def flush(self) -> bool:
        """Wait until everything that was computed is in the store; False when time ran out."""

    def kill_replica(self, name: str) -> None:
        """End that replica's process with SIGKILL."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may choose about the scenarios themselves.

    `routers`: the policy of the shared load run; with several, they are compared in runs of their
    own.
    """

    ngram_window: int = 3
    ngram_candidates: int = 10
    routers: tuple[str, ...] = ()
    chaos: bool = False
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything that a scenario needs."""

    config: ClusterConfig
    model: ModelSource
    prompts: Prompts
    sizes: Sizes
    screen: Screen
    report_dir: Path
    options: Options
    serve: Callable[[ClusterConfig], AbstractAsyncContextManager[Serving]]


class Scenario(Protocol):
    """A scenario: runs, prints, and gives its figures."""

    async def __call__(self, demo: Demo) -> ScenarioResult:
        """Run it."""


def greedy(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> GenerationRequest:
    """A request whose answer depends on the prompt alone."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest(request_id, prompt, sampling)
