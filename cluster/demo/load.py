"""Scenario `load`: what a shared cache and a router are worth when several people ask at once.

The same seeded conversations are served three times by two replicas: without any reuse, with each
replica's own device pool, and with the shared cache and the prefix router. The pools are smaller
than what is read, as they are in earnest, so a replica alone loses what it has computed.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.demo.asking import Answer, Asks
from cluster.demo.chaos import KillOnce
from cluster.demo.conversations import hold_conversations
from cluster.demo.documents import load_documents
from cluster.demo.report import draw_load_chart
from cluster.demo.rules import print_rules
from cluster.demo.scenario import Demo, Serving
from cluster.demo.setups import fresh_cache, kv_cache_bytes, setup
from cluster.demo.traffic import ClientScript, num_requests, plan_traffic
from shared_cache.errors import KvcommonsError

REPLICAS = 2
LABELS = {
    "none": "(a) no reuse",
    "local": "(b) alone",
    "shared": "(c) shared",
}
CHART_LABELS = {
    "none": "no reuse",
    "local": "each replica\nalone",
    "shared": "shared cache\nand router",
}
TIERS = ("device", "host", "shared", "computed")


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """One run of the traffic; times at the caller, tokens from the receipts.

    `blocks_from_peers` were loaded from host memory where another replica had put them.
    """

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tokens_per_s: float
    prefill_tokens_computed: int
    tokens_from: dict[str, int]
    blocks_from_peers: int
    num_requests: int
    num_failovers: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All three runs. With `chaos`, `killed` names the replica that was ended on purpose.

    `rules` has, for each routing rule that was compared, a run of replicas `alone`, with no cache
    but their devices, and one with the `shared` cache.
    """

    modes: dict[str, ModeFigures]
    num_lost: int
    identical_output: bool
    chaos: bool
    killed: str | None
    chart: str
    rules: dict[str, dict[str, ModeFigures]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The figures, with the issue's names."""
        rest = asdict(self)
        modes: dict[str, Any] = rest.pop("modes")
        return modes | rest

    def summary(self) -> str:
        """The outcome in words for somebody new to all this."""
        none, local, shared = (self.modes[mode] for mode in LABELS)
        return (
            f"With several clients at once, sharing computed {shared.prefill_tokens_computed} "
            f"prompt tokens where each replica alone computed {local.prefill_tokens_computed} and "
            f"no reuse {none.prefill_tokens_computed}; the median wait for a first token was "
            f"{shared.ttft_p50_s:.2f} s instead of {local.ttft_p50_s:.2f} s and "
            f"{none.ttft_p50_s:.2f} s."
        )

    def failures(self) -> list[str]:
        """The expectations that were not met."""
        found = []
        local, shared = (self.modes[name].prefill_tokens_computed for name in ("local", "shared"))
        if shared >= local:
            found.append(f"sharing computed {shared} prompt tokens, each replica alone {local}")
        if self.num_lost:
            found.append(f"{self.num_lost} requests were lost")
        if self.chaos and not self.killed:
            found.append("no answer was long enough to kill its replica in the middle of it")
        if self.killed and not self.identical_output:
            found.append(f"killing {self.killed} changed an output")
        return found


async def run_load(demo: Demo) -> LoadResult:
    """Run the scenario; writes the bar chart into the report folder."""
    sizes = demo.sizes.load
    scripts = plan_traffic(
        load_documents()[: sizes.num_documents],
        demo.options.seed,
        sizes.num_clients,
        sizes.conversations_per_client,
        sizes.turns_per_conversation,
    )
    demo.screen.scenario(
        "load: several people, several documents, two replicas",
        f"{sizes.num_clients} clients hold {num_requests(scripts)} turns of conversations about "
        f"{sizes.num_documents} documents, three times over: (a) without reuse, (b) each replica "
        "alone with what it has computed, (c) with the shared cache and the router.",
    )
    runs, rules = {}, {}
    with tempfile.TemporaryDirectory(prefix="kvcommons-demo-") as folder:
        for mode, config in _setups(demo, Path(folder)).items():
            runs[mode] = await _run(demo, LABELS[mode], mode == "shared", config, scripts)
        for rule, configs in _rule_setups(demo, Path(folder)).items():
            rules[rule] = {
                place: (await _run(demo, f"{rule}, {place}", False, config, scripts)).figures()
                for place, config in configs.items()
            }
    result = _result(demo, runs, rules)
    _print_result(demo, result)
    if rules:
        print_rules(demo.screen, rules)
    return result


def _setups(demo: Demo, store: Path) -> dict[str, ClusterConfig]:
    """The three modes: the same pool everywhere; only reuse, cache and router differ."""
    routers = demo.options.routers or (demo.config.router.policy,)
    return {
        "none": _mode(demo, "none", "round_robin", None, reuse=False),
        "local": _mode(demo, "local", "round_robin", None),
        "shared": _mode(demo, "shared", routers[0], store),
    }


def _rule_setups(demo: Demo, folder: Path) -> dict[str, dict[str, ClusterConfig]]:
    """For each rule of a comparison: replicas alone, and with a shared cache that begins empty."""
    rules = demo.options.routers if len(demo.options.routers) > 1 else ()
    return {
        rule: {
            "alone": _mode(demo, "alone", rule, None),
            "shared": _mode(demo, "shared", rule, folder / rule),
        }
        for rule in rules
    }


def _mode(
    demo: Demo, name: str, policy: str, store: Path | None, reuse: bool = True
) -> ClusterConfig:
    """The user's cluster with small pools and this policy; `store` is where its cache begins."""
    sizes = demo.sizes.load
    block = demo.config.engine.kv_cache_config.tokens_per_block
    pool = {"max_tokens": sizes.pool_tokens(block), "host_cache_size": None}
    engine = {
        "kv_cache_config": pool | {"enable_block_reuse": reuse},
        "speculative_config": None,
    }
    cache = None
    if store is not None:
        read_tokens = 2 * sizes.num_documents * sizes.request_tokens
        reserve_bytes = kv_cache_bytes(demo.model, demo.config.engine, read_tokens)
        cache = fresh_cache(demo.config, store, reserve_bytes).model_dump()
    router = {"policy": policy}
    return setup(demo.config, name, REPLICAS, engine=engine, cache=cache, router=router)


async def _run(
    demo: Demo, label: str, may_kill: bool, config: ClusterConfig, scripts: Sequence[ClientScript]
) -> "_Run":
    total = num_requests(scripts)
    async with demo.serve(config) as serving:
        asks: Asks = serving.dispatcher
        killer = None
        if demo.options.chaos and may_kill:
            asks = killer = KillOnce(asks, serving.kill_replica, after_requests=total // 3)
        started_s = time.perf_counter()
        with demo.screen.progress(label, total) as advance:
            answers = await hold_conversations(demo, asks, scripts, advance)
        wall_s = time.perf_counter() - started_s
        peer_blocks = await blocks_from_peers(serving)
    killed = killer.killed if killer else None
    if killed:
        demo.screen.detail(f"{killed} was killed with SIGKILL while it was answering", "yellow")
    return _Run(answers, total - len(answers), wall_s, killed, peer_blocks)


async def blocks_from_peers(serving: Serving) -> int:
    """What the replicas that answer have counted; one that was killed may still be starting."""
    try:
        stats = await serving.stats()
    except KvcommonsError:
        return 0
    return sum(one.cache.peer_blocks for one in stats if one.cache is not None)


@dataclass(frozen=True, slots=True)
class _Run:
    answers: dict[str, Answer]
    num_lost: int
    wall_s: float
    killed: str | None
    peer_blocks: int

    def figures(self) -> ModeFigures:
        return figures_of(list(self.answers.values()), self.wall_s, self.peer_blocks)


def figures_of(answers: Sequence[Answer], wall_s: float, peer_blocks: int) -> ModeFigures:
    """What is told of these answers, of which there is one at least."""
    ttft_s = [answer.ttft_s for answer in answers]
    tiers = {tier: sum(getattr(one.receipt, tier) for one in answers) for tier in TIERS}
    return ModeFigures(
        ttft_mean_s=sum(ttft_s) / len(ttft_s),
        ttft_p50_s=percentile(ttft_s, 0.5),
        ttft_p90_s=percentile(ttft_s, 0.9),
        ttft_p99_s=percentile(ttft_s, 0.99),
        tokens_per_s=sum(len(answer.token_ids) for answer in answers) / wall_s,
        prefill_tokens_computed=tiers["computed"],
        tokens_from=tiers,
        blocks_from_peers=peer_blocks,
        num_requests=len(answers),
        num_failovers=sum(answer.num_failovers for answer in answers),
        wall_s=wall_s,
    )


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest of `values` that at least `fraction` of them do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(1, math.ceil(fraction * len(ranked))) - 1]


def _result(
    demo: Demo, runs: dict[str, _Run], rules: dict[str, dict[str, ModeFigures]]
) -> LoadResult:
    figures = {mode: run.figures() for mode, run in runs.items()}
    texts = [{name: one.text for name, one in run.answers.items()} for run in runs.values()]
    chart = demo.report_dir / "load.png"
    draw_load_chart({mode: asdict(one) for mode, one in figures.items()}, CHART_LABELS, chart)
    return LoadResult(
        modes=figures,
        num_lost=sum(run.num_lost for run in runs.values()),
        identical_output=all(one == texts[0] for one in texts),
        chaos=demo.options.chaos,
        killed=runs["shared"].killed,
        chart=str(chart),
        rules=rules,
    )


def _print_result(demo: Demo, result: LoadResult) -> None:
    rows = [
        (
            LABELS[mode],
            f"{one.ttft_p50_s:.2f} s",
            f"{one.ttft_p99_s:.2f} s",
            f"{one.tokens_per_s:.1f}",
            *(str(one.tokens_from[tier]) for tier in ("computed", "device", "host", "shared")),
        )
        for mode, one in result.modes.items()
    ]
    columns = ("Mode", "TTFT p50", "p99", "tokens/s", "computed", "device", "host", "shared")
    title = "Time to first token, output tokens/s, and where the prompt tokens came from"
    demo.screen.table(title, columns, rows)
    demo.screen.note(
        f"{result.modes['shared'].blocks_from_peers} blocks came from host memory where the other "
        f"replica had put them. The chart is in {result.chart}"
    )
    local, shared = (result.modes[name].prefill_tokens_computed for name in ("local", "shared"))
    good = not result.failures()
    success = f"with sharing {shared / local:.2f} of the prompt tokens were computed"
    if result.killed:
        success += f"; {result.killed} was killed, no request was lost, no answer changed"
    demo.screen.verdict(good, success if good else "; ".join(result.failures()))
