"""Numbers on their way to the device, for which nobody waits.

A copy from memory that is not pinned ends only when everything before it on its stream has ended:
the host would wait for the pass that is running. And a copy that takes one of the device's copy
engines stands in line there behind a prefix that is being loaded, with the whole pass behind it.
"""

from collections.abc import Sequence

import torch

INLINE_BYTES = 4096
"""A copy that the driver makes without a copy engine. Beside a load of 1 GiB, which takes 20 ms, so
many bytes were there at once and 256 KiB after 17 ms (H200, driver 580)."""


def send(host: torch.Tensor, to: torch.Tensor) -> None:
    """Copy `host`, contiguous and pinned where there is a GPU, to `to` without waiting."""
    step = INLINE_BYTES // host.element_size()
    for part, place in zip(host.split(step), to.split(step), strict=True):
        place.copy_(part, non_blocking=True)


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """`numbers` as int64 on `device`, there before what is put on the current stream later."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
    there = torch.empty_like(host, device=device)
    send(host, there)
    return there
