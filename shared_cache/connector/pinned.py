"""Host memory that a device copies from and to by itself, given back when nobody copies any more.

The driver knows pinned memory by its address. Were it unmapped before it is given back, the driver
would take whatever comes to lie there for it, and copy old bytes. So the memory is held here as
long as it is pinned, and apart from the pool: whoever shows new memory must not keep a pool alive.
"""

import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

_FOR_ALL_DEVICES = 1
"""cudaHostRegisterPortable: threads that register may have another current device."""


class PinnedMemory:
    """What was pinned for one device. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._is_released = False
        self._registered: list[tuple[int, memoryview]] = []
        self._ranges: tuple[tuple[int, int], ...] = ()

    def pin(self, memory: memoryview) -> None:
        """Have the device copy by itself from and to `memory`; nothing after `release`.

        Raises `RuntimeError` when the driver refuses.
        """
        address = np.frombuffer(memory, np.uint8).ctypes.data
        with self._lock:
            if self._is_released:
                return
            with torch.cuda.device(self.device):  # else each rank would take memory of the first
                error = _cuda_runtime().cudaHostRegister(address, memory.nbytes, _FOR_ALL_DEVICES)
            if int(error) != 0:
                raise RuntimeError(
                    f"the driver does not pin {memory.nbytes} bytes of the host tier (CUDA error "
                    f"{int(error)}): loads and saves are slower; raise the limit of locked memory"
                )
            self._registered.append((address, memory))
            self._ranges = tuple((start, start + part.nbytes) for start, part in self._registered)

    def holds_all(self, addresses: Iterable[int]) -> bool:
        """Whether all of these are addresses of pinned memory; takes no lock."""
        low = high = 0
        for address in addresses:
            if low <= address < high:
                continue
            found = (one for one in self._ranges if one[0] <= address < one[1])
            low, high = next(found, (0, 0))
            if low == high:
                return False
        return True

    def release(self) -> None:
        """Wait for the device's copies and give all back, for good; again is a no-op."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            self._ranges = ()
            with suppress(RuntimeError):  # a broken device copies nothing any more
                torch.cuda.synchronize(self.device)
            with torch.cuda.device(self.device):
                while self._registered:
                    address, _ = self._registered.pop()
                    _cuda_runtime().cudaHostUnregister(address)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
