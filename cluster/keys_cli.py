"""`kvcommons keys create|list|revoke|hash`: the document of tenants and API keys.

A key is printed once, when it is made; the document keeps its hash only. Comments in the document
are lost when it is written; write it by hand with `keys hash` to keep them.
"""

import argparse
import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.endpoint.keys import hash_key, new_key, parse_keys
from shared_cache.errors import ConfigError, KvcommonsError

SALT_BYTES = 16
DEFAULT_FILE = "keys.yaml"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to `parser`."""
    commands = parser.add_subparsers(dest="keys_command", required=True)
    for name, (_, text, takes) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name != "hash":
            command.add_argument("--file", default=DEFAULT_FILE, help="the document (%(default)s)")
        for option, settings in takes.items():
            command.add_argument(option, **settings)


def run(parsed: argparse.Namespace) -> int:
    """Run one subcommand; its exit status."""
    options = {name: value for name, value in vars(parsed).items() if name != "command"}
    command = _COMMANDS[options.pop("keys_command")][0]
    try:
        return command(**options)
    except KvcommonsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def create(file: str, tenant: str, group: str | None, admin: bool) -> int:
    """Make a key, and its tenant and group where they are new; print the key."""
    path, document = Path(file), _read(Path(file))
    key, key_id, digest = new_key()
    tenants, groups = document.setdefault("tenants", {}), document.setdefault("groups", {})
    if group is not None:
        groups.setdefault(group, {"salt": secrets.token_hex(SALT_BYTES)})
    settings = tenants.setdefault(tenant, {"salt": secrets.token_hex(SALT_BYTES)})
    if group is not None and settings.setdefault("group", group) != group:
        raise ConfigError(
            f"tenant {tenant!r} is in the group {settings['group']!r}; change that in {file} itself"
        )
    entry = {"id": key_id, "tenant": tenant, "sha256": digest}
    document.setdefault("keys", []).append({**entry, "admin": True} if admin else entry)
    _write(path, document)
    print(key)
    print(f"written to {file}; the key itself is kept nowhere", file=sys.stderr)
    return 0


def list_keys(file: str) -> int:
    """Print ids, tenants and who is an admin."""
    for entry in _read(Path(file)).get("keys", []):
        print(f"{entry['id']}  {entry['tenant']}{'  admin' if entry.get('admin') else ''}")
    return 0


def revoke(file: str, id: str) -> int:
    """Take a key out; running endpoints refuse it within seconds."""
    path, document = Path(file), _read(Path(file))
    kept = [entry for entry in document.get("keys", []) if entry["id"] != id]
    if len(kept) == len(document.get("keys", [])):
        raise ConfigError(f"{file} has no key with the id {id!r}; `kvcommons keys list` shows them")
    if not kept:
        raise ConfigError(
            "this is the last key, and a document without keys is not valid; make another one first"
        )
    _write(path, {**document, "keys": kept})
    return 0


def hash_given() -> int:
    """Print what a document keeps of the key on standard input."""
    print(hash_key(sys.stdin.readline().strip()))
    return 0


def _read(path: Path) -> dict[str, Any]:
    """The document as it is written; empty where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    parse_keys(text, str(path))
    return dict(yaml.safe_load(text))


def _write(path: Path, document: dict[str, Any]) -> None:
    """Replace the document in one step, readable by this user only."""
    text = yaml.safe_dump(document, sort_keys=False)
    parse_keys(text, str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error


_NEW: dict[str, dict[str, Any]] = {
    "--tenant": {"required": True, "help": "whose key it is"},
    "--group": {"help": "tenants of one group share their blocks"},
    "--admin": {"action": "store_true", "help": "may use the routes that change the cache"},
}
_COMMANDS: dict[str, tuple[Callable[..., int], str, dict[str, dict[str, Any]]]] = {
    "create": (create, "make a key and print it, once", _NEW),
    "list": (list_keys, "show ids and tenants", {}),
    "revoke": (revoke, "take a key out", {"--id": {"required": True, "help": "the key's id"}}),
    "hash": (hash_given, "print the hash of the key on standard input", {}),
}
