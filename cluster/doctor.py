"""`kvcommons doctor`: is what an engine needs on this machine, and does it do what it should?

Errors of an installation show late and in strange places; here each thing is looked at by itself
and told in a line, with what to do.
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
from actors.engines.trtllm.findings import Finding, run_probes
from actors.engines.trtllm.trial import judge, run_trial
from cluster.config import load_config
from shared_cache.errors import ConfigError

MARKS = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--engine", choices=["trtllm"], default="trtllm", help="which engine")
    parser.add_argument(
        "--config",
        help="a cluster's YAML: its engine is then started twice on a small store of its own "
        "(minutes, and as many GPUs as one replica has)",
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="all findings, for programs"
    )


def run(options: argparse.Namespace) -> int:
    """Look at everything; exit status 1 when something fails. Raises `ConfigError`."""
    findings = list(_shown(_looked_at(), quiet=options.as_json))
    is_usable = all(one.state != "fail" for one in findings)
    if options.config is not None and is_usable:
        findings += _shown(_tried(_replica_config(options.config)), quiet=options.as_json)
    if options.as_json:
        print(json.dumps([asdict(one) for one in findings], indent=2))
    return int(any(one.state == "fail" for one in findings))


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


def _replica_config(path: str) -> ReplicaConfig:
    from cluster.models import resolve_model

    config = load_config(path)
    if config.engine.kind != "trtllm":
        raise ConfigError(f"{path} describes another engine: give one with engine.kind: trtllm")
    return ReplicaConfig(name="doctor", model=resolve_model(config.model), engine=config.engine)


def _tried(config: ReplicaConfig) -> Iterable[Finding]:
    with tempfile.TemporaryDirectory(prefix="kvcommons-trial-") as folder:
        try:
            trial = asyncio.run(run_trial(config, Path(folder)))
        except Exception as error:
            yield Finding("trial", "fail", f"{type(error).__name__}: {error}")
            return
    yield from judge(trial, config.engine.kv_cache_config.tokens_per_block)
