"""Joining the Ray that runs on this machine, or starting one; and keeping it quiet.

`ray.init(address="auto")` joins any Ray that it finds, also one that another program has started
for itself and will end at will. Here only one is that was meant to be joined: what `ray start`
or `RAY_ADDRESS` names. Ray's own output (a line for each worker, for each warning) would
bury what a person has to read. Token authentication stays as Ray sets it.
"""

import logging
import os
import socket
from typing import Any

import ray

from shared_cache.errors import ConfigError

_ENVIRONMENT = {
    # Serve gives its HTTP proxy 5 s to come up, then kills it, and `serve.run` fails with it: too
    # few where engines that load their models take all cores.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else: a FutureWarning for each actor without GPU
    "TOKENIZERS_PARALLELISM": "false",  # else: a warning when a process forks
}
_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_PROBE_TIMEOUT_S = 2.0


def join_ray(dashboard: bool | None = None) -> bool:
    """Make sure that this process is in a Ray cluster; True when the caller has to leave it.

    In this order: the one this process is in already, the one that `ray start` or `RAY_ADDRESS`
    names, a new one on this machine that ends with this process. `dashboard` is for a new one;
    None: when it is installed.
    """
    if ray.is_initialized():
        return False
    if not attach_ray():
        ray.init(address="local", include_dashboard=dashboard, **_OPTIONS)
    return True


def attach_ray() -> bool:
    """Join the Ray that `ray start` or `RAY_ADDRESS` names; False when there is none.

    Raises `ConfigError` when `RAY_ADDRESS` names one that cannot be joined.
    """
    if ray.is_initialized():
        return True
    set_environment()
    if not os.environ.get("RAY_ADDRESS") and not _is_started():
        return False
    try:
        # Without an address: Ray itself takes RAY_ADDRESS or what `ray start` noted; and only
        # then does it use the token in ~/.ray/auth_token of its own accord.
        ray.init(**_OPTIONS)
    except ConnectionError as error:
        raise ConfigError(
            f"the running Ray cannot be joined: {error}. If RAY_ADDRESS is set, check it or unset "
            "it; if that cluster uses token authentication (Ray's default), this machine needs its "
            "~/.ray/auth_token, and RAY_AUTH_MODE=token together with RAY_ADDRESS"
        ) from error
    return True


def set_environment() -> None:
    """Settings of Ray that it takes from the environment when it starts; what is set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _is_started() -> bool:
    """Whether the last `ray start` of this machine still listens."""
    from ray._private.services import find_bootstrap_address  # no public function tells it

    address: str | None = find_bootstrap_address(None)
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PROBE_TIMEOUT_S).close()
    except OSError:
        return False  # it was killed, and its note was left behind
    return True
