"""`kvcommons cache ls|stat|verify|gc|warm|bench`: look at a store and look after it.

Works on a whole store, other models' namespaces too, beside running replicas. What only looks
changes nothing. Exit status: 0 good, 1 `verify` found damage, 2 an error that a person can mend,
told in one line.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from cluster import cache_bench, cache_tables, cache_warm
from cluster.cache_target import add_target, chosen, existing, progress, readable, show, whole_store
from cluster.units import parse_bytes, parse_duration_s, show_bytes
from shared_cache.errors import ConfigError, KvcommonsError
from shared_cache.namespace import Namespace
from shared_cache.stores.store import StoredRun
from shared_cache.upkeep.collecting import CollectionRules
from shared_cache.upkeep.inventory import take_inventory
from shared_cache.upkeep.upkeep import Collected, plan_collection
from shared_cache.upkeep.verifying import CheckedObject
from shared_cache.upkeep.whole_store import FoundNamespace, WholeStore

DAMAGED = 1
FAILED = 2
INTERRUPTED = 130


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `kvcommons cache` to its parser."""
    commands = parser.add_subparsers(dest="cache_command", required=True)
    for name, (_, text, add_arguments) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; its exit status."""
    try:
        return _COMMANDS[arguments.cache_command][0](arguments)
    except KvcommonsError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def ls(arguments: argparse.Namespace) -> int:
    """Print the namespaces of a store, or the runs of one of them."""
    whole, now_s = whole_store(arguments), time.time()
    if arguments.namespace is not None:
        ((found, namespace),) = readable(whole, arguments.namespace)
        runs = sorted(_runs(whole, found, namespace), key=lambda run: (-run.used_s, run.name))
        data = [cache_tables.run_data(run) for run in runs]
        show(data if arguments.as_json else None, cache_tables.run_table(runs, now_s))
        return 0
    rows = [
        (found, take_inventory(_runs(whole, found, found.namespace)) if found.namespace else None)
        for found in existing(whole)
    ]
    namespaces = [cache_tables.namespace_data(row) for row in rows]
    table = cache_tables.namespace_table(rows, now_s)
    show(namespaces if arguments.as_json else None, table)
    return 0


def stat(arguments: argparse.Namespace) -> int:
    """Print the totals of every namespace."""
    whole = whole_store(arguments)
    inventories = {
        found.fingerprint: take_inventory(_runs(whole, found, namespace))
        for found, namespace in readable(whole, arguments.namespace)
    }
    data = {fingerprint: asdict(one) for fingerprint, one in inventories.items()}
    table = cache_tables.stat_table(inventories, time.time())
    show(data if arguments.as_json else None, table)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read and check every block; with `--repair` delete the objects that are bad."""
    whole, num_objects, num_blocks = whole_store(arguments), 0, 0
    bad: list[tuple[str, CheckedObject]] = []
    for found, namespace in readable(whole, arguments.namespace):
        what = f"verifying {found.fingerprint[: cache_tables.SHORT_DIGITS]}"
        with closing(whole.open(namespace)) as store, progress(what, found.num_bytes) as advance:
            for one in whole.verify(namespace):
                advance(one.num_bytes)
                num_objects, num_blocks = num_objects + 1, num_blocks + one.num_blocks
                if one.fault is not None:
                    bad.append((found.fingerprint, one))
                    if arguments.repair:
                        store.delete(one.name)
    data = {
        "is_good": not bad,
        "num_objects": num_objects,
        "num_good_blocks": num_blocks,
        "bad": [{"namespace": name, **asdict(one)} for name, one in bad],
        "is_repaired": bool(bad and arguments.repair),
    }
    fate = "deleted" if arguments.repair else "--repair deletes them"
    good = f"{num_objects - len(bad)} objects with {num_blocks} blocks are good"
    text = f"{good}; {len(bad)} objects are bad ({fate})" if bad else good
    table = cache_tables.check_table(bad) if bad else None
    show(data if arguments.as_json else None, table, text)
    return DAMAGED if bad else 0


def gc(arguments: argparse.Namespace) -> int:
    """Delete runs by age and budget, those first that were not used for longest."""
    rules = _rules(arguments)
    whole = whole_store(arguments)
    with ExitStack() as opened:
        found = chosen(whole, arguments.namespace)
        if not arguments.dry_run:
            whole.find(tidies=True)
        stores = whole.deletable(found)
        for store in stores.values():
            opened.callback(store.close)
        with progress("listing", None):
            plan = plan_collection(stores, rules, time.time())
        if not arguments.dry_run:
            with progress("deleting", len(plan.victims)) as advance:
                for victim in plan.victims:
                    stores[victim.namespace].delete(victim.run.name)
                    advance(1)
    verb = "would be deleted" if arguments.dry_run else "deleted"
    size, left = show_bytes(plan.num_bytes), show_bytes(plan.left_bytes)
    text = f"{len(plan.victims)} objects with {size} {verb}; {left} stay"
    table = cache_tables.victim_table(plan.victims) if plan.victims else None
    data = _collected_data(plan, arguments.dry_run)
    show(data if arguments.as_json else None, table, text)
    return 0


def _rules(arguments: argparse.Namespace) -> CollectionRules:
    if arguments.max_bytes is None and arguments.max_age is None:
        raise ConfigError("gc needs a rule: --max-bytes 100GiB, --max-age 7d, or both")
    return CollectionRules(
        None if arguments.max_bytes is None else parse_bytes(arguments.max_bytes),
        None if arguments.max_age is None else parse_duration_s(arguments.max_age),
    )


def _collected_data(plan: Collected, dry_run: bool) -> dict[str, Any]:
    return {
        "is_dry_run": dry_run,
        "num_objects": len(plan.victims),
        "num_bytes": plan.num_bytes,
        "left_bytes": plan.left_bytes,
        "objects": [
            {
                "folder": victim.namespace,
                "name": victim.run.name,
                "num_bytes": victim.run.num_bytes,
                "reason": victim.reason,
            }
            for victim in plan.victims
        ],
    }


def _runs(whole: WholeStore, found: FoundNamespace, namespace: Namespace) -> list[StoredRun]:
    """All runs of a namespace, by reading the head of every object."""
    runs = []
    what = f"reading {found.fingerprint[: cache_tables.SHORT_DIGITS]}"
    with closing(whole.open(namespace)) as store, progress(what, found.num_objects) as advance:
        for run in store.entries():
            runs.append(run)
            advance(1)
    return runs


def _looking(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    _add_json(parser)


def _verifying(parser: argparse.ArgumentParser) -> None:
    _looking(parser)
    parser.add_argument("--repair", action="store_true", help="delete the objects that are bad")


def _collecting(parser: argparse.ArgumentParser) -> None:
    _looking(parser)
    parser.add_argument("--max-bytes", metavar="SIZE", help="what all may take together: 100GiB")
    parser.add_argument("--max-age", metavar="TIME", help="longest time without use: 7d, 12h")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", dest="as_json", action="store_true", help="for programs")


_COMMANDS: dict[
    str,
    tuple[Callable[[argparse.Namespace], int], str, Callable[[argparse.ArgumentParser], None]],
] = {
    "ls": (ls, "list namespaces, or the runs of one", _looking),
    "stat": (stat, "totals, lengths of runs, waste", _looking),
    "verify": (verify, "read every block and check it", _verifying),
    "gc": (gc, "delete by age and budget", _collecting),
    "warm": (cache_warm.warm, "load the hottest prefixes into this node", cache_warm.add_arguments),
    "bench": (cache_bench.bench, "measure this machine and store", cache_bench.add_arguments),
}
