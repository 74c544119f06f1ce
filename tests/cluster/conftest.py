"""One Ray for all tests of this folder, as starting one takes seconds; replicas that need none."""

import logging
import socket
import warnings
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.cluster.administered import Setup
from tests.tiny_model import make_tiny_model, tiny_source
from tests.tiny_replicas import tiny_replica

with warnings.catch_warnings():  # importing Ray Serve uses what pydantic has deprecated
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401


METRICS_INTERVAL_MS = 1000


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Where the Ray of `ray_session` exports its metrics."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def ray_session(metrics_port):
    import ray

    from cluster.ray_session import set_environment

    set_environment()
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _metrics_export_port=metrics_port,
        _system_config={"metrics_report_interval_ms": METRICS_INTERVAL_MS},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def admin_model(tmp_path_factory):
    return tiny_source(make_tiny_model(tmp_path_factory.mktemp("admin")))


@pytest.fixture
def setup(admin_model, tmp_path):
    @asynccontextmanager
    async def make(*changes):
        async with AsyncExitStack() as stack:
            yield Setup(
                [
                    await stack.enter_async_context(
                        tiny_replica(f"r{index}", admin_model, tmp_path, **change)
                    )
                    for index, change in enumerate(changes)
                ]
            )

    return make
