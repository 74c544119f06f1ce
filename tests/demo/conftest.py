"""A tiny model folder, for runs of the demo that take seconds."""

from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, spread so that the text depends on the prompt and soon repeats itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(folder, seed=2, initializer_range=0.12)
