"""One Ray for all tests of this folder: starting one takes seconds."""

import logging
import warnings

import pytest

with warnings.catch_warnings():  # importing Ray Serve uses what pydantic has deprecated
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401


@pytest.fixture(scope="session")
def ray_session():
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()
