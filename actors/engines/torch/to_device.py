"""Numbers on their way to the device, for which nobody waits.

A copy from memory that is not pinned ends only when everything before it on its stream has ended:
the host would wait for the pass that is running.
"""

from collections.abc import Sequence

import torch


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """`numbers` as int64 on `device`, there before what is put on the current stream later."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
    return host.to(device, non_blocking=True)
