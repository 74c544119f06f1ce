"""Whether a GPU's memory is free: asked before an engine starts and after it has ended.

An engine that ended badly leaves processes behind that keep its memory, and the next one fails for
want of it minutes later, in the middle of loading, with an error that names neither. Here the wait
is bounded, and its end names the processes. `nvidia-smi` is asked, because to ask CUDA costs some
hundred MiB on every GPU that is asked.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared_cache.errors import KvcommonsError

QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)
PROCESSES = (
    "nvidia-smi",
    "--query-compute-apps=gpu_uuid,pid,used_memory",
    "--format=csv,noheader,nounits",
)
QUERY_TIMEOUT_S = 20.0
POLL_S = 0.5
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU's memory now."""

    index: int
    uuid: str
    used_bytes: int
    total_bytes: int


def visible_gpus() -> tuple[GpuMemory, ...]:
    """The GPUs that this process may use; none where `nvidia-smi` is missing or fails."""
    found = [_gpu(line) for line in _lines(QUERY)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(gpu for gpu in found if str(gpu.index) in names or _is_named(gpu, names))


def users_of(gpus: Sequence[GpuMemory]) -> str:
    """The processes that hold memory of these GPUs, in words; nvidia-smi sees its own host's."""
    uuids = {gpu.uuid for gpu in gpus}
    rows = [[part.strip() for part in line.split(",")] for line in _lines(PROCESSES)]
    seen = [f"process {row[1]} ({row[2]} MiB)" for row in rows if len(row) == 3 and row[0] in uuids]
    return ", ".join(seen) or "no process that nvidia-smi can see from here"


def await_memory(
    most_used: Callable[[GpuMemory], int],
    timeout_s: float,
    gpus: Callable[[], Sequence[GpuMemory]] = visible_gpus,
) -> tuple[GpuMemory, ...]:
    """Wait until no GPU uses more bytes than `most_used` of it; those that still do in the end."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        full = tuple(gpu for gpu in gpus() if gpu.used_bytes > most_used(gpu))
        left_s = deadline_s - time.monotonic()
        if not full or left_s <= 0:
            return full
        time.sleep(min(POLL_S, left_s))


def still_used(full: Sequence[GpuMemory], timeout_s: float) -> KvcommonsError:
    """The error for memory that did not get free."""
    amounts = ", ".join(f"GPU {gpu.index}: {gpu.used_bytes / (1 << 30):.1f} GiB" for gpu in full)
    return KvcommonsError(
        f"the engine has ended, but its GPU memory is still in use after {timeout_s:g} s "
        f"({amounts}; {users_of(full)}); another engine would not find room. End this process "
        f"({os.getpid()}), and with `kill` those that it left behind, before starting the next one"
    )


def _gpu(line: str) -> GpuMemory:
    index, uuid, used, total = (part.strip() for part in line.split(","))
    return GpuMemory(int(index), uuid, int(used) * MIB, int(total) * MIB)


def _is_named(gpu: GpuMemory, names: Sequence[str]) -> bool:
    return any(name.startswith("GPU-") and gpu.uuid.startswith(name) for name in names)


def _lines(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [line for line in done.stdout.splitlines() if line.count(",") >= 2]
