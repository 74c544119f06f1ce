"""`kvcommons up|status|down`: the endpoint in the background, on the Ray of this machine.

`kvcommons cache ...` looks after the store behind it (see `cache_cli`), `kvcommons doctor` at what
an engine needs on this machine (see `doctor`). Errors that a person can mend are one line on stderr
and exit status 1 (of `cache`: 2), not a stack trace.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import ray
from rich.console import Console

from actors.replica_health import ReplicaStats
from cluster import cache_cli, doctor, keys_cli
from cluster.clients import NamedActor, RayRouterClient
from cluster.config import ClusterConfig, load_config
from cluster.ray_session import attach_ray
from cluster.status import as_data, as_table
from shared_cache.errors import ConfigError, KvcommonsError, ReplicaUnavailableError

STATS_TIMEOUT_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parser = argparse.ArgumentParser(prog="kvcommons", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--config", default="configs/cpu.yaml", help="the cluster's YAML (%(default)s)"
        )
        if name == "status":
            command.add_argument(
                "--json", dest="as_json", action="store_true", help="all figures, for programs"
            )
    text = "look at a store and look after it"
    cache_cli.add_commands(commands.add_parser("cache", help=text, description=text))
    text = "make and revoke API keys"
    keys_cli.add_commands(commands.add_parser("keys", help=text, description=text))
    text = "look at what an engine needs on this machine"
    doctor.add_arguments(commands.add_parser("doctor", help=text, description=text))
    parsed = parser.parse_args(arguments)
    if parsed.command == "cache":
        return cache_cli.run(parsed)
    if parsed.command == "keys":
        return keys_cli.run(parsed)
    try:
        if parsed.command == "doctor":
            return doctor.run(parsed)
        options = vars(parsed)
        run, config = _COMMANDS[options.pop("command")][0], options.pop("config")
        return run(load_config(config), **options)
    except KvcommonsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def up(config: ClusterConfig) -> int:
    """Deploy the endpoint and return; starts a Ray that outlives this command if none runs."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from cluster.app import application
    from cluster.dashboard_files import install_dashboard
    from cluster.models import resolve_model

    model = resolve_model(config.model)
    if not attach_ray():
        print("no Ray runs on this machine: starting one (`ray stop` ends it)")
        _start_ray()
        attach_ray()
    if config.name in serve.status().applications:
        raise ConfigError(
            f"{config.name!r} is up already; `kvcommons down` first, or set another `name` and port"
        )
    serve.start(http_options=HTTPOptions(host=config.serve.host, port=config.serve.port))
    serve.run(application(config, model), name=config.name)
    dashboard = install_dashboard()
    if dashboard is not None:
        print(f"the dashboard for Grafana is beside Ray's own ones: {dashboard}")
    print(f"{model.name} is served at http://{config.serve.host}:{config.serve.port}/v1")
    return 0


def status(config: ClusterConfig, as_json: bool = False) -> int:
    """Print what router and replicas say; exit status 1 when there is no cluster."""
    if not attach_ray():
        raise ReplicaUnavailableError("no Ray runs on this machine; `kvcommons up` starts one")
    snapshot = asyncio.run(RayRouterClient(config.router_name).snapshot())
    stats = {one.replica_id: _stats(one.replica_id) for one in snapshot.replicas}
    if as_json:
        print(json.dumps(as_data(snapshot, stats), indent=2))
    else:
        Console().print(as_table(snapshot, stats))
    return 0


def down(config: ClusterConfig) -> int:
    """Delete the endpoint and its cluster; Ray itself goes on."""
    if not attach_ray():
        print("no Ray runs on this machine, so nothing is up")
        return 0
    from ray import serve

    if config.name not in serve.status().applications:
        print(f"no application {config.name!r} is up")
        return 0
    serve.delete(config.name)
    print(f"{config.name} is down; Ray goes on (`ray stop` ends it)")
    return 0


def _start_ray() -> None:
    """`ray start --head` with token authentication, whose token is made if this user has none."""
    _ray_command("get-auth-token", "--generate")
    _ray_command("start", "--head", "--disable-usage-stats")


def _ray_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KvcommonsError(f"`ray {' '.join(arguments)}` failed:\n{done.stdout}{done.stderr}")


def _stats(name: str) -> ReplicaStats | None:
    try:
        call = NamedActor(name).handle().stats.remote()
        stats: ReplicaStats = ray.get(call, timeout=STATS_TIMEOUT_S)
    except (ReplicaUnavailableError, ray.exceptions.RayError):
        return None
    return stats


_COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "up": (up, "deploy the OpenAI endpoint in the background"),
    "status": (status, "show the replicas"),
    "down": (down, "remove the endpoint and its replicas"),
}

if __name__ == "__main__":
    sys.exit(main())
