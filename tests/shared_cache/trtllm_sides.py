"""The adapters as TensorRT-LLM finds and constructs them, on a package made from our table."""

import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared_cache.connector import process
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.trtllm_doubles import OldArgs, save_model, write_package

SIZE = 8
ADAPTERS = "shared_cache.connector.tensorrt_llm"
Connector = tuple[Any, Any]


def forget_modules() -> None:
    for name in list(sys.modules):
        if name == ADAPTERS or name.split(".")[0] == "tensorrt_llm":
            del sys.modules[name]
    package = sys.modules.get("shared_cache.connector")
    if package is not None and hasattr(package, "tensorrt_llm"):
        del package.tensorrt_llm


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ModuleType]]:
    """Makes a release's `tensorrt_llm` importable, and imports our adapters on it."""

    def install(release: str, mpi_rank: int = 0) -> ModuleType:
        forget_modules()
        root = tmp_path / f"site-{release}-{mpi_rank}"
        if not root.exists():
            write_package(root, release, mpi_rank=mpi_rank)
        monkeypatch.syspath_prepend(str(root))
        return importlib.import_module(ADAPTERS)

    yield install
    while process.current_cache() is not None:
        process.leave_current(0.0)
    forget_modules()


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """Write the connector's YAML with a store and `text`, and name it as a user does."""
    file = tmp_path / "cache.yaml"
    file.write_text(f"store: file://{tmp_path}/store\nstats_period_s: 0\n{text}\n")
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", str(file))
    return file


def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    return folder if folder.exists() else save_model(folder)


def construct(adapters: ModuleType, llm_args: OldArgs) -> Connector:
    """Both sides at once in two threads, as TensorRT-LLM's creator does it on rank 0."""
    with ThreadPoolExecutor(max_workers=2) as executor:
        worker = executor.submit(adapters.SharedCacheWorker, llm_args)
        scheduler = executor.submit(adapters.SharedCacheScheduler, llm_args)
        return scheduler.result(WAIT_S), worker.result(WAIT_S)


class Request:
    """`LlmRequest` of C++: no attribute beyond what 1.2 binds."""

    cache_salt_id = None
    lora_task_id = None
    multimodal_hashes = None

    def __init__(self, request_id: int, tokens: list[int]) -> None:
        self.request_id = request_id
        self._tokens = tokens

    def get_tokens(self, beam: int) -> list[int]:
        return list(self._tokens)
