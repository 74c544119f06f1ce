"""What the cache commands print: tables for people, plain data for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from cluster.units import show_age, show_bytes
from shared_cache.stores.store import StoredRun
from shared_cache.upkeep.collecting import Victim
from shared_cache.upkeep.inventory import Inventory
from shared_cache.upkeep.verifying import CheckedObject
from shared_cache.upkeep.whole_store import FoundNamespace

SHORT_DIGITS = 12
"""Digits of a fingerprint that tables show; `--namespace` takes them."""

UNREADABLE = "(not readable: another format version, or no namespace.json)"

Row = tuple[FoundNamespace, Inventory | None]
"""A namespace and what it holds; None for one that cannot be read."""


def namespace_table(rows: Sequence[Row], now_s: float) -> Table:
    """`cache ls`: one line for every namespace."""
    table = _table("namespace", "model", "engine", "dtype", "blocks>", "size>", "last use>")
    for found, inventory in rows:
        short, size = found.fingerprint[:SHORT_DIGITS], show_bytes(found.num_bytes)
        namespace = found.namespace
        if namespace is None or inventory is None:
            version = found.folder.partition("/")[0]
            table.add_row(short, f"{version} {UNREADABLE}", "-", "-", "-", size, "-")
            continue
        shard = f" {namespace.tp_rank}/{namespace.tp_size}" if namespace.tp_size > 1 else ""
        table.add_row(
            short,
            namespace.model + shard,
            namespace.engine,
            namespace.layout.dtype,
            str(inventory.num_blocks),
            size,
            show_age(inventory.used_last_s, now_s),
        )
    return table


def namespace_data(row: Row) -> dict[str, Any]:
    """One line of `cache ls --json`."""
    found, inventory = row
    return {
        "fingerprint": found.fingerprint,
        "folder": found.folder,
        "namespace": None if found.namespace is None else asdict(found.namespace),
        "num_objects": found.num_objects,
        "num_blocks": None if inventory is None else inventory.num_blocks,
        "num_bytes": found.num_bytes,
        "used_s": None if inventory is None else inventory.used_last_s,
    }


def run_table(runs: Iterable[StoredRun], now_s: float) -> Table:
    """`cache ls --namespace`: one line for every run."""
    table = _table("first block", "parent", "blocks>", "size>", "last use>")
    for run in runs:
        first, parent = run.hashes[0].hex()[:16], run.parent.hex()[:16]
        size, age = show_bytes(run.num_bytes), show_age(run.used_s, now_s)
        table.add_row(first, parent, str(len(run.hashes)), size, age)
    return table


def run_data(run: StoredRun) -> dict[str, Any]:
    """One run of `cache ls --namespace --json`."""
    return {
        "name": run.name,
        "parent": run.parent.hex(),
        "hashes": [block_hash.hex() for block_hash in run.hashes],
        "num_bytes": run.num_bytes,
        "used_s": run.used_s or None,
    }


def stat_table(rows: Mapping[str, Inventory], now_s: float) -> Table:
    """`cache stat`: totals, one column for every namespace."""
    names = [name[:SHORT_DIGITS] for name in rows]
    table = _table("", *(f"{name}>" for name in names))
    columns = [_stat_lines(one, now_s) for one in rows.values()]
    lengths = sorted({length for one in rows.values() for length in one.run_lengths})
    for label in columns[0] if columns else ():
        table.add_row(label, *(column[label] for column in columns))
    for length in lengths:
        counts = (str(one.run_lengths.get(length, 0)) for one in rows.values())
        table.add_row(_length_label(length), *counts)
    return table


def check_table(bad: Iterable[tuple[str, CheckedObject]]) -> Table:
    """`cache verify`: the bad objects."""
    table = _table("namespace", "object", "size>", "fault")
    for fingerprint, one in bad:
        short, size = fingerprint[:SHORT_DIGITS], show_bytes(one.num_bytes)
        table.add_row(short, one.name, size, one.fault)
    return table


def victim_table(victims: Sequence[Victim]) -> Table:
    """`cache gc`: how much goes, by namespace and rule."""
    table = _table("namespace", "rule", "runs>", "blocks>", "size>")
    groups: dict[tuple[str, str], list[StoredRun]] = {}
    for victim in victims:
        groups.setdefault((victim.namespace, victim.reason), []).append(victim.run)
    for (folder, reason), runs in sorted(groups.items()):
        num_blocks = sum(len(run.hashes) for run in runs)
        size = show_bytes(sum(run.num_bytes for run in runs))
        short = folder.rpartition("/")[2][:SHORT_DIGITS]
        table.add_row(short, reason, str(len(runs)), str(num_blocks), size)
    return table


def _stat_lines(one: Inventory, now_s: float) -> dict[str, str]:
    return {
        "objects": str(one.num_runs),
        "blocks": str(one.num_blocks),
        "size": show_bytes(one.num_bytes),
        "blocks stored once more than needed": str(one.num_duplicates),
        "runs without a beginning, or of a salt or adapter": str(one.num_unrooted),
        "first use": show_age(one.used_first_s, now_s),
        "last use": show_age(one.used_last_s, now_s),
    }


def _length_label(length: int) -> str:
    first = length // 2 + 1
    blocks = "1 block" if length == 1 else f"{first}-{length} blocks" if first < length else "2"
    return f"runs of {blocks}"


def _table(*columns: str) -> Table:
    """A plain table; a column whose name ends in `>` holds figures."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        justify = "right" if column.endswith(">") else "left"
        table.add_column(column.rstrip(">"), justify=justify)  # type: ignore[arg-type]
    return table
