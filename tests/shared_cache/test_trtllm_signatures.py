"""Our classes against TensorRT-LLM's interface: the recorded one, and the real one where it is.

The table was written from TensorRT-LLM's source, release by release. A method that upstream calls
and we lack, or that takes other arguments, would end an engine at its first request.
"""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from shared_cache.connector import interface
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.worker import SharedCacheWorker
from tests.shared_cache.trtllm_doubles import TABLE

OURS = {
    "KvCacheConnectorScheduler": SharedCacheScheduler,
    "KvCacheConnectorWorker": SharedCacheWorker,
}
SIDES = sorted(OURS)
INHERITED = {"get_connector_meta", "_clear_connector_meta", "register_forward_pass_callable"}
"""What upstream's base class does well enough: nothing."""


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("release", TABLE)
@pytest.mark.parametrize("side", SIDES)
def test_we_have_every_abstract_method_with_upstream_s_parameters(side: str, release: str) -> None:
    told = TABLE[release][side]
    abstract = {name: method for name, method in told.items() if method.get("abstract")}
    assert len(abstract) == {"KvCacheConnectorScheduler": 4, "KvCacheConnectorWorker": 6}[side]
    for name, method in abstract.items():
        assert parameters_of(getattr(OURS[side], name)) == method["parameters"], name


@pytest.mark.parametrize("release", TABLE)
@pytest.mark.parametrize("side", SIDES)
def test_what_we_replace_besides_has_upstream_s_parameters_too(side: str, release: str) -> None:
    for name, method in TABLE[release][side].items():
        ours = getattr(OURS[side], name, None)
        if name == "__init__" or ours is None:
            assert name == "__init__" or not method.get("abstract")
        else:
            assert parameters_of(ours) == method["parameters"], name


def test_what_we_leave_to_upstream_s_classes_is_known() -> None:
    left = {
        name
        for release in TABLE.values()
        for side in SIDES
        for name in release[side]
        if name != "__init__" and not hasattr(OURS[side], name)
    }
    assert left == INHERITED | {
        "wait_for_initialization",
        "register_kv_cache_layout",
        "request_finished_by_layer_group",
        "update_state_after_alloc_by_layer_group",
    }


@pytest.mark.parametrize("release", TABLE)
@pytest.mark.parametrize("name", ["RequestData", "SchedulerOutput"])
def test_every_field_that_we_read_is_in_every_release(name: str, release: str) -> None:
    ours = [field.name for field in dataclasses.fields(getattr(interface, name))]
    upstream = TABLE[release][name]
    assert upstream[: len(ours)] == ours


@pytest.mark.parametrize("side", SIDES)
def test_the_protocols_name_the_same_methods(side: str) -> None:
    protocol = getattr(interface, side)
    for name in (name for name in vars(protocol) if not name.startswith("_")):
        assert parameters_of(getattr(OURS[side], name)) == parameters_of(getattr(protocol, name))


def real_module() -> tuple[Any, str]:
    """The installed TensorRT-LLM's module of base classes, and its release."""
    package = pytest.importorskip("tensorrt_llm", reason="TensorRT-LLM is not installed")
    for name in ("connectors.kv_cache_connector", "kv_cache_connector"):
        try:
            module = importlib.import_module(f"tensorrt_llm._torch.pyexecutor.{name}")
        except ModuleNotFoundError:
            continue
        return module, ".".join(package.__version__.split(".")[:2])
    raise AssertionError("neither module path is there: write the new one into the adapters")


@pytest.mark.parametrize("side", SIDES)
def test_the_installed_classes_are_the_recorded_ones(side: str) -> None:
    module, release = real_module()
    real = getattr(module, side)
    assert real.__abstractmethods__ <= set(dir(OURS[side]))
    for name in real.__abstractmethods__:
        assert parameters_of(getattr(OURS[side], name)) == parameters_of(getattr(real, name)), name
    if release in TABLE:
        for name, method in TABLE[release][side].items():
            assert parameters_of(getattr(real, name)) == method["parameters"], name


@pytest.mark.parametrize("name", ["RequestData", "SchedulerOutput"])
def test_the_installed_records_have_the_fields_that_we_read(name: str) -> None:
    module, _ = real_module()
    real = {field.name for field in dataclasses.fields(getattr(module, name))}
    assert {field.name for field in dataclasses.fields(getattr(interface, name))} <= real


def test_tensorrt_llm_has_two_doors() -> None:
    root = Path(__file__).parents[2]
    static, lazy = r"^\s*(import|from)\s+tensorrt_llm\b", r"import_module\(.tensorrt_llm"
    imported = re.compile(f"{static}|{lazy}", re.MULTILINE)
    doors = {
        str(file.relative_to(root))
        for part in ("shared_cache", "actors", "cluster")
        for file in (root / part).rglob("*.py")
        if imported.search(file.read_text(encoding="utf-8"))
    }
    assert doors <= {"shared_cache/connector/tensorrt_llm.py", "actors/engines/trtllm/api.py"}
