"""`kvcommons doctor`: do the replicas of the running cluster share, and if not, exactly why?

A cache that shares nothing, like an error of an installation, shows late and in strange places;
here each thing is looked at by itself and told in a line, with what to do.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from actors.config import ReplicaConfig
from actors.engines.trtllm.doctor import machine, package, version
from actors.engines.trtllm.trial import judge, run_trial
from actors.findings import Finding, run_probes
from cluster.canaries import try_cluster
from cluster.clients import RayRouterClient
from cluster.config import ClusterConfig, load_config
from cluster.ray_session import attach_ray
from shared_cache.errors import ReplicaUnavailableError

DEFAULT_CONFIG = "configs/cpu.yaml"

MARKS = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--engine",
        choices=["trtllm"],
        help="look at what this engine needs on this machine; alone, at nothing else",
    )
    parser.add_argument(
        "--config",
        help=f"the cluster's YAML (without --engine: {DEFAULT_CONFIG}). If it runs, canaries go "
        "through every pair of its replicas. If not, an engine of kind trtllm is started twice on "
        "a small store of its own (minutes, and as many GPUs as one replica has)",
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="all findings, for programs"
    )


def run(options: argparse.Namespace) -> int:
    """Look at everything; exit status 1 when something fails. Raises `ConfigError`."""
    path = options.config or (None if options.engine else DEFAULT_CONFIG)
    config = load_config(path) if path is not None else None
    findings: list[Finding] = []
    if options.engine or (config is not None and config.engine.kind == "trtllm"):
        findings += _shown(_looked_at(), quiet=options.as_json)
    if config is not None:
        is_usable = all(one.state != "fail" for one in findings)
        findings += _shown(_cluster_findings(config, str(path), is_usable), quiet=options.as_json)
    if options.as_json:
        print(json.dumps([asdict(one) for one in findings], indent=2))
    return int(any(one.state == "fail" for one in findings))


def _cluster_findings(config: ClusterConfig, path: str, is_usable: bool) -> Iterable[Finding]:
    """Canaries through the cluster if it runs; else a trial, where there is one to make."""
    try:
        if attach_ray():
            yield from asyncio.run(_canary_findings(config))
            return
    except ReplicaUnavailableError:
        pass
    if config.engine.kind == "trtllm":
        if is_usable:
            yield from _tried(_replica_config(config))
        return
    advice = f"`kvcommons up --config {path}` starts it"
    yield Finding("cluster", "fail", f"no cluster {config.name!r} runs in this Ray: {advice}")


async def _canary_findings(config: ClusterConfig) -> list[Finding]:
    """What canaries show now; raises `ReplicaUnavailableError` when no cluster runs."""
    snapshot = await RayRouterClient(config.router_name).snapshot()
    if config.cache is None:
        return [Finding("cache", "warn", "no `cache` section: the replicas share nothing")]
    report = await try_cluster([one.replica_id for one in snapshot.replicas])
    return report.findings


def _shown(findings: Iterable[Finding], quiet: bool) -> Iterable[Finding]:
    console = Console()
    for one in findings:
        if not quiet:
            console.print(f"{MARKS[one.state]} {one.name}: ", end="")
            console.print(one.text, markup=False, highlight=False)
        yield one


def _looked_at() -> Iterable[Finding]:
    (installed,) = run_probes({"version": version})
    yield installed
    if installed.state != "fail":  # else they all say the same
        yield from run_probes(package())
    yield from run_probes(machine())


def _replica_config(config: ClusterConfig) -> ReplicaConfig:
    from cluster.models import resolve_model

    return ReplicaConfig(name="doctor", model=resolve_model(config.model), engine=config.engine)


def _tried(config: ReplicaConfig) -> Iterable[Finding]:
    with tempfile.TemporaryDirectory(prefix="kvcommons-trial-") as folder:
        try:
            trial = asyncio.run(run_trial(config, Path(folder)))
        except Exception as error:
            yield Finding("trial", "fail", f"{type(error).__name__}: {error}")
            return
    yield from judge(trial, config.engine.kv_cache_config.tokens_per_block)
