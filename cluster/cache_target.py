"""Which store a cache command is about, and the bar that shows how far it is.

A wrong address must not look like an empty store: `verify` would call it sound. So a command on a
store without any namespace is an error.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.config import load_config
from shared_cache.config import CacheConfig
from shared_cache.errors import ConfigError
from shared_cache.namespace import Namespace
from shared_cache.settings_file import expand_store_url
from shared_cache.upkeep.whole_store import FoundNamespace, WholeStore


def add_target(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which store, and which namespace of it."""
    add_store(parser)
    parser.add_argument(
        "--namespace", metavar="FP", help="only this namespace: the first digits of `cache ls`"
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which store."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--store", metavar="URL", help="fsspec URL or folder of the store")
    where.add_argument("--config", metavar="YAML", help="the cluster whose shared tier it is")
    parser.add_argument(
        "--options",
        metavar="JSON",
        help='options of its file system, such as \'{"endpoint_url": "http://host:9000"}\'',
    )


def whole_store(arguments: argparse.Namespace) -> WholeStore:
    """The store that the arguments name; not looked at yet."""
    if arguments.store is not None:
        try:
            url = expand_store_url(arguments.store)
        except ValueError as error:
            raise ConfigError(f"--store: {error}") from error
        return WholeStore(url, _options(arguments.options))
    tiers = cache_config(arguments.config).all_tiers
    if not tiers:
        raise ConfigError(f"{arguments.config} names no store; give --store URL")
    return WholeStore(tiers[-1].url, _options(arguments.options) or tiers[-1].options)


def cache_config(path: str) -> CacheConfig:
    """The `cache` section of a cluster's YAML, as its replicas get it."""
    config = load_config(path).replica_cache
    if config is None:
        raise ConfigError(f"{path} has no `cache` section: its replicas share nothing")
    return config


def existing(whole: WholeStore) -> list[FoundNamespace]:
    """The namespaces of a store, of which there must be one."""
    found = whole.find()
    if not found:
        raise ConfigError(
            f"nothing is stored in {whole.url}: check the address (replicas begin a store when "
            "they first save a block)"
        )
    return found


def chosen(whole: WholeStore, prefix: str | None = None) -> list[FoundNamespace]:
    """All namespaces, or the one whose fingerprint `prefix` begins."""
    found = existing(whole)
    if prefix is None:
        return found
    fitting = [one for one in found if one.fingerprint.startswith(prefix.lower())]
    if len(fitting) != 1:
        names = ", ".join(one.fingerprint[:12] for one in found)
        problem = "fits more than one namespace" if fitting else "is no namespace"
        raise ConfigError(f"--namespace {prefix} {problem} of {whole.url}; there are: {names}")
    return fitting


def readable(
    whole: WholeStore, prefix: str | None = None
) -> list[tuple[FoundNamespace, Namespace]]:
    """Those of the `chosen` that this program can read, of which there must be one."""
    found = chosen(whole, prefix)
    good = [(one, one.namespace) for one in found if one.namespace is not None]
    if not good:
        folders = ", ".join(one.folder for one in found)
        raise ConfigError(f"this program cannot read what is stored in {whole.url}: {folders}")
    return good


@contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Show how far the block is, on a terminal only; yields what to call with each step."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def show(data: object | None, table: Table | None, text: str | None = None) -> None:
    """Print `data` for programs, or, if None, `table` and `text` for people."""
    if data is not None:
        print(json.dumps(data, indent=2))
        return
    console = Console(highlight=False)
    for part in (table, text):
        if part is not None:
            console.print(part, soft_wrap=not console.is_terminal)


def _options(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError("--options takes a JSON object, such as '{\"anon\": true}'")
    return options
