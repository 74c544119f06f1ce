"""Numbers on their way to the device and back, for which nobody waits.

A copy from memory that is not pinned ends only when everything before it on its stream has ended:
the host would wait for the pass that is running. And a copy that is made by one of the device's
copy engines stands in line behind a prefix that is being loaded, with the pass behind it: beside
loads of 1 GiB, the slowest turns took 26 ms instead of 7 (H200). So kernels make these copies: they
read and write pinned host memory.
"""

import threading
from collections import deque
from collections.abc import Sequence

import torch

_lock = threading.Lock()
_kept: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
"""Host memory that kernels may still use: the allocator does not know of them."""

_TYPES = {torch.int32: "<i4", torch.int64: "<i8", torch.uint8: "|u1"}


class _SeenByDevice:
    """Pinned host memory as the device sees it, for `torch.as_tensor`."""

    def __init__(self, host: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": _TYPES[host.dtype],
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def send(host: torch.Tensor, to: torch.Tensor) -> None:
    """Copy `host` to `to`, both contiguous, in the order of the current stream.

    `host` may be written again only when that has been done, and is kept until then.
    """
    if not to.is_cuda:
        to.copy_(host)
        return
    torch.add(torch.as_tensor(_SeenByDevice(host), device=to.device), 0, out=to)
    _keep(host)


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """`numbers` as int64 on `device`, there before what is put on the current stream later."""
    host = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda" or not len(host):
        return host.to(device)
    there = torch.empty_like(host, device=device)
    send(host.pin_memory(), there)
    return there


def to_host(numbers: torch.Tensor) -> torch.Tensor:
    """Pinned memory in which `numbers` appear when what is on the current stream has been done."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    torch.add(numbers, 0, out=torch.as_tensor(_SeenByDevice(host), device=numbers.device))
    _keep(host)
    return host


def _keep(host: torch.Tensor) -> None:
    used = torch.cuda.Event()  # type: ignore[no-untyped-call]
    used.record()
    with _lock:  # there may be several engines
        while _kept and _kept[0][0].query():  # type: ignore[no-untyped-call]
            _kept.popleft()
        _kept.append((used, host))
