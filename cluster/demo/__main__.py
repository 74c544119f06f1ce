"""`python -m cluster.demo`: the options, the scenarios in order, the report, the exit code.

Exit code 0 says that every expectation was met (identical outputs, blocks matched and reused, no
request lost), 1 that one was not, 2 that the demo could not run; the text says which and why.
"""

import argparse
import asyncio
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from actors.router_config import RouterConfig
from cluster.config import ClusterConfig, load_config
from cluster.demo.console import Screen
from cluster.demo.load import run_load
from cluster.demo.ngram import run_ngram
from cluster.demo.offload import run_offload
from cluster.demo.prompts import Prompts, model_max_tokens
from cluster.demo.report import ScenarioResult, build_report, write_json
from cluster.demo.scenario import Demo, Options, Scenario
from cluster.demo.share import run_share
from cluster.demo.sizes import fitted_sizes
from cluster.demo.summary import print_summary
from cluster.models import resolve_model
from shared_cache.errors import KvcommonsError

SCENARIOS: dict[str, Scenario] = {
    "share": run_share,
    "offload": run_offload,
    "ngram": run_ngram,
    "load": run_load,
}
DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cpu.yaml"
DEFAULT_MODEL = "smollm2-135m"
POLICIES = get_args(RouterConfig.model_fields["policy"].annotation)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a usage text when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.demo",
        description="Shows what a shared KV cache does for several LLM replicas, on any machine.",
    )
    add = parser.add_argument
    add("--scenario", choices=[*SCENARIOS, "all"], default="all", help="default: all")
    add("--config", type=Path, help="cluster YAML (default: configs/cpu.yaml)")
    add("--model", help="alias, folder or hub id; overrides the configuration")
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    add("--report-dir", type=Path, default=Path("report"), help="for charts (default: report)")
    add(
        "--router",
        type=_policies,
        default=(),
        metavar="NAME[,NAME...]",
        help="routing policy of the shared load run; with several, they are compared: "
        + ", ".join(POLICIES),
    )
    add("--chaos", action="store_true", help="kill -9 a replica during the shared load run")
    add("--ngram-window", type=_positive, default=3, help="tokens looked up (default: 3)")
    add("--ngram-candidates", type=_positive, default=10, help="tokens drafted (default: 10)")
    add("--seed", type=int, default=7, help="seed of the load traffic (default: 7)")
    add("--quick", action="store_true", help="small prompts and little traffic, for a first look")
    return parser.parse_args(arguments)


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [one for one in names if one not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join(POLICIES)}"
        )
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {number}")
    return number


def read_config(file: Path | None, model: str | None) -> ClusterConfig:
    """The configuration from `file`, from the checkout's `configs/cpu.yaml`, or built in."""
    if file is None and not DEFAULT_CONFIG.exists():
        return ClusterConfig(model=model or DEFAULT_MODEL)
    config = load_config(file or DEFAULT_CONFIG)
    return config.model_copy(update={"model": model}) if model else config


def prepare(arguments: argparse.Namespace, screen: Screen) -> Demo:
    """Everything that the scenarios need; fetches the model when it is not there yet."""
    from cluster.demo.runtime import serve  # here: it brings Ray, which `--help` does not need

    config = read_config(arguments.config, arguments.model)
    model = resolve_model(config.model)
    block = config.engine.kv_cache_config.tokens_per_block
    sizes = fitted_sizes(model_max_tokens(model, config.engine), block, arguments.quick)
    return Demo(
        config=config,
        model=model,
        prompts=Prompts.of_model(model),
        sizes=sizes,
        screen=screen,
        report_dir=arguments.report_dir,
        options=Options(
            ngram_window=arguments.ngram_window,
            ngram_candidates=arguments.ngram_candidates,
            routers=arguments.router,
            chaos=arguments.chaos,
            seed=arguments.seed,
        ),
        serve=functools.partial(serve, model=model),
    )


async def run_scenarios(demo: Demo, names: Sequence[str]) -> dict[str, ScenarioResult]:
    """The scenarios in order; the results by name."""
    return {name: await SCENARIOS[name](demo) for name in names}


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """The demo; the exit code. Raises `KvcommonsError` when it cannot run."""
    from cluster.demo.runtime import ray_session

    started_s = time.perf_counter()
    names = list(SCENARIOS) if arguments.scenario == "all" else [arguments.scenario]
    demo = prepare(arguments, screen)
    with ray_session() as which_ray:
        screen.note(f"{which_ray} Model: {demo.model.name}, in {demo.model.path}.")
        results = asyncio.run(run_scenarios(demo, names))
    report = build_report(
        results, demo.config.model_dump(mode="json"), time.perf_counter() - started_s
    )
    if arguments.json:
        write_json(report, arguments.json)
    print_summary(screen, results, report)
    return 0 if report["ok"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    screen = Screen()
    try:
        return run(parsed, screen)
    except KvcommonsError as error:
        screen.verdict(False, str(error))
        return 2
    except KeyboardInterrupt:
        screen.note("stopped; nothing is left running")
        return 130


if __name__ == "__main__":
    sys.exit(main())
