"""Looks at an installation of TensorRT-LLM: is what this code was written from what is here?

The engine and the connector were written from sources, and upstream moves. Whoever starts them on a
new version wants to know what differs before a request does. Nothing here loads a model.
"""

import dataclasses
import importlib
import inspect
import os
import resource
import shutil
from typing import Any

from actors.engines.trtllm.api import load_api
from actors.engines.trtllm.arguments import CONNECTOR_MODULE
from actors.engines.trtllm.gpu_memory import visible_gpus
from actors.findings import Finding, Probe

NEW_MODULE = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
OLD_MODULE = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
READ_AT = ("1.2", "1.3", "1.4")
"""Versions whose sources were read."""

REQUEST_FIELDS = (
    "request_id",
    "new_tokens",
    "new_block_ids",
    "computed_position",
    "num_scheduled_tokens",
)
KV_FIELDS = (
    "enable_block_reuse",
    "enable_partial_reuse",
    "event_buffer_max_size",
    "free_gpu_memory_fraction",
    "host_cache_size",
    "max_tokens",
    "tokens_per_block",
)
ADDED_LATER = frozenset(
    (
        "request_finished_by_layer_group",
        "update_state_after_alloc_by_layer_group",
        "register_kv_cache_layout",
        "wait_for_initialization",
    )
)
"""Methods of later versions whose defaults serve us."""


def package() -> dict[str, Probe]:
    """The probes of the package itself; they need it to be installed."""
    return {
        "connector interface": connector_interface,
        "request reports": request_reports,
        "cache settings": cache_settings,
        "salts": salts,
    }


def machine() -> dict[str, Probe]:
    """The probes of the machine and of this process's surroundings."""
    return {
        "GPUs": gpus,
        "shared memory": shared_memory,
        "locked memory": locked_memory,
        "environment": environment,
    }


def version() -> Finding:
    """Whether this version's sources were read."""
    api = load_api()
    is_known = api.version.startswith(READ_AT)
    text = f"TensorRT-LLM {api.version}"
    if is_known:
        return Finding("version", "ok", text)
    return Finding("version", "warn", f"{text}: read were {', '.join(READ_AT)}; expect differences")


def connector_module() -> Any:
    """Upstream's module of the connector's base classes, at its new or its old place."""
    try:
        return importlib.import_module(NEW_MODULE)
    except ModuleNotFoundError:
        return importlib.import_module(OLD_MODULE)


def connector_interface() -> Finding:
    """Whether our two classes have upstream's methods, with upstream's parameters."""
    upstream, ours = connector_module(), importlib.import_module(CONNECTOR_MODULE)
    sides = (
        ("KvCacheConnectorScheduler", ours.SharedCacheScheduler),
        ("KvCacheConnectorWorker", ours.SharedCacheWorker),
    )
    problems = [
        problem for name, mine in sides for problem in differences(getattr(upstream, name), mine)
    ]
    if problems:
        text = f"{'; '.join(problems)}: take a version that docs/tensorrt-llm.md names"
        return Finding("connector interface", "fail", text)
    return Finding("connector interface", "ok", f"{upstream.__name__}, as expected")


def differences(upstream: type, ours: type) -> list[str]:
    """What upstream's base class asks for and ours does not have, or has otherwise."""
    found = [f"{name} is missing" for name in sorted(getattr(ours, "__abstractmethods__", ()))]
    for name, theirs in inspect.getmembers(upstream, inspect.isfunction):
        mine = getattr(ours, name, None)
        if name.startswith("_") or mine is None or name in ADDED_LATER:
            continue
        wanted, have = _parameters(theirs), _parameters(mine)
        if wanted[: len(have)] != have or len(wanted) > len(have):
            found.append(f"{name} takes {', '.join(wanted)}, ours {', '.join(have)}")
    return found


def _parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


def request_reports() -> Finding:
    """Whether a turn's report has the fields that the connector reads."""
    fields = [field.name for field in dataclasses.fields(connector_module().RequestData)]
    missing = [name for name in REQUEST_FIELDS if name not in fields]
    if missing:
        return Finding("request reports", "fail", f"RequestData has no {', '.join(missing)}")
    return Finding("request reports", "ok", ", ".join(fields))


def cache_settings() -> Finding:
    """Whether `KvCacheConfig` has the fields that the engine sets."""
    fields = load_api().kv_cache_fields()
    missing = [name for name in KV_FIELDS if name not in fields]
    if missing:
        return Finding("cache settings", "fail", f"KvCacheConfig has no {', '.join(missing)}")
    return Finding("cache settings", "ok", f"{len(KV_FIELDS)} of {len(fields)} fields are used")


def salts() -> Finding:
    """Whether a salt's number is what upstream's rule makes of it."""
    number = load_api().salt_id("kvcommons")
    text = f"cache_salt_id of `kvcommons`: {number}"
    is_right = isinstance(number, int) and 0 <= number < 1 << 64
    return Finding("salts", "ok" if is_right else "fail", text)


def gpus() -> Finding:
    """The GPUs of this process and whether their memory is free."""
    found = visible_gpus()
    if not found:
        text = "nvidia-smi shows none to this process; start the container with --gpus all"
        return Finding("GPUs", "fail", text)
    gib = 1 << 30
    text = ", ".join(
        f"GPU {gpu.index}: {gpu.used_bytes / gib:.1f} of {gpu.total_bytes / gib:.0f} GiB"
        for gpu in found
    )
    is_busy = any(gpu.used_bytes > gpu.total_bytes // 10 for gpu in found)
    return Finding("GPUs", "warn" if is_busy else "ok", f"{text} in use")


def shared_memory() -> Finding:
    """Room for the arena."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm has {usage.free / (1 << 30):.1f} of {usage.total / (1 << 30):.1f} GiB free"
    if usage.total >= 1 << 30:
        return Finding("shared memory", "ok", text)
    advice = "start the container with --ipc=host, or --shm-size as large as cache.host.bytes"
    return Finding("shared memory", "fail", f"{text}; {advice}")


def locked_memory() -> Finding:
    """Whether CUDA may pin the arena."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "no limit")
    text = f"{limit / (1 << 20):.0f} MiB; start the container with --ulimit memlock=-1"
    return Finding("locked memory", "warn", f"{text}, else copies are several times slower")


def environment() -> Finding:
    """Variables that change what TensorRT-LLM does."""
    if os.environ.get("FORCE_DETERMINISTIC") == "1":
        text = "FORCE_DETERMINISTIC=1 switches block reuse off; unset it"
        return Finding("environment", "fail", text)
    surrounding = sorted(
        name for name in os.environ if name.startswith(("SLURM_", "PMI_", "PMIX_", "OMPI_COMM_"))
    )
    if surrounding:
        text = f"{', '.join(surrounding[:4])} are set: MPI may take this process for a rank; unset"
        return Finding("environment", "warn", text)
    return Finding("environment", "ok", "nothing that would disturb")
