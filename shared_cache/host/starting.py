"""Reaching the owner of a node's arena, and starting one where none lives.

Many processes begin at once and all need the owner. One of them starts it, the others wait; and an
owner must not be the child of any of them, as it outlives them all.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.hashing import ReuseScope
from shared_cache.host.folder import ArenaPaths, HeldLock, is_locked
from shared_cache.host.terms import StoreAdmission

START_TIMEOUT_S = 10.0
IDLE_EXIT_S = 600.0
EXIT_FAILED = 1
EXIT_RUNNING = 3
"""The exit code of an owner that found another one at work."""

_RETRY_S = 0.02
_LOG_LINES = 8
_ROOT = Path(__file__).resolve().parents[2]


def connect_to_owner(
    paths: ArenaPaths, config: HostConfig, admission: StoreAdmission
) -> socket.socket:
    """A connection to the arena's owner, which is started if need be and allowed.

    Waits up to `START_TIMEOUT_S`; then raises `ConfigError` that says what is to be done.
    """
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        connected = try_connect(paths)
        if connected is not None:
            return connected
        if config.start_owner:
            start_owner(paths, config, admission)
        if time.monotonic() > deadline_s:
            raise ConfigError(_how_to_start(paths, config))
        time.sleep(_RETRY_S)


def try_connect(paths: ArenaPaths) -> socket.socket | None:
    """A connection to the arena's owner; None if it does not listen."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(1.0)
    try:
        connected.connect(str(paths.socket))
    except OSError:  # no such file, nobody listens, or too many wait already
        connected.close()
        return None
    return connected


def start_owner(paths: ArenaPaths, config: HostConfig, admission: StoreAdmission) -> None:
    """Start an owner in the background unless one lives or is being started by another process.

    Returns when it serves. Raises `ConfigError` with what it said if it could not start.
    """
    if is_locked(paths.lock):
        return
    starter = HeldLock.acquire(paths.starter)
    if starter is None:
        return
    try:
        if not is_locked(paths.lock):
            _run_in_background(paths, _arguments(paths, config, admission))
    finally:
        starter.release(remove=True)


def parse_quotas(texts: Sequence[str]) -> dict[bytes, int]:
    """Quotas as the owner's command line has them, by tenant; raises `ValueError`."""
    pairs = [text.partition("=") for text in texts]
    return {bytes.fromhex(tenant): int(limit) for tenant, _, limit in pairs}


def _arguments(paths: ArenaPaths, config: HostConfig, admission: StoreAdmission) -> list[str]:
    """The owner's command line; it names no cache salt, as everybody can read it."""
    quotas = [
        f"--quota={ReuseScope(salt).tenant.hex()}={int(limit)}"
        for salt, limit in config.quotas.items()
    ]
    return [
        f"--name={config.name}",
        f"--bytes={int(config.bytes)}",
        f"--folder={paths.folder.absolute()}",
        f"--eviction={config.eviction}",
        f"--admission={admission}",
        f"--exit-when-idle-s={IDLE_EXIT_S:g}",
        *(["--populate"] if config.populate else []),
        *quotas,
    ]


def _run_in_background(paths: ArenaPaths, arguments: Sequence[str]) -> None:
    search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "shared_cache.host", *arguments, "--detach"]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with os.fdopen(os.open(paths.log, flags, 0o600), "ab") as log:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "PYTHONPATH": search_path},
                timeout=START_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"the arena's owner did not start: {error}") from error
    if done.returncode not in (0, EXIT_RUNNING):
        raise ConfigError(f"the arena's owner did not start: {_last_words(paths)}")


def _how_to_start(paths: ArenaPaths, config: HostConfig) -> str:
    if is_locked(paths.lock):
        return (
            f"the owner of the arena {paths.arena} does not answer; stop it and let it start "
            f"again. It said: {_last_words(paths)}"
        )
    return (
        f"nobody owns the arena {paths.arena}: start its owner with `python -m shared_cache.host "
        f"--name {config.name} --bytes {int(config.bytes)} --folder {paths.folder}`, or set "
        "cache.host.start_owner to true"
    )


def _last_words(paths: ArenaPaths) -> str:
    with suppress(OSError):
        return "\n".join(paths.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    return "nothing"
