"""Applications on a local Ray to measure: started, warmed, deleted."""

import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

with warnings.catch_warnings():  # importing Ray Serve uses what pydantic has deprecated
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

QUIET = {"log_level": "ERROR", "enable_access_log": False}
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Measured:
    """The issue's figures, and what they were made of."""

    figures: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray and a Serve of our own on a free port, which `port` then tells."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        Port.number = int(probe.getsockname()[1])
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(http_options={"host": HOST, "port": Port.number}, logging_config=QUIET)
        yield
        serve.shutdown()
    finally:
        ray.shutdown()


class Port:
    """Where the local Serve listens."""

    number = 0


@contextmanager
def deployed(make: Callable[[str], Any], name: str) -> Iterator[None]:
    """An application while it is measured; `make` gets a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="kvcommons-endpoint-") as folder:
        serve.run(make(folder), name=name, route_prefix="/", logging_config=QUIET)
        try:
            yield
        finally:
            serve.delete(name)
