"""One file per block with torch.save and torch.load: what TensorRT-LLM's example connector does."""

import time
from pathlib import Path

import torch

from benchmarks.rivals.workload import Workload, empty_folder


class TorchFiles:
    """Saves and loads the workload in this process; `folder` is emptied."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self._work = workload
        self._folder = folder
        self._paths = [str(folder / f"{number}.pt") for number in range(workload.num_blocks)]
        # A tensor for each block: of a view into a larger one, torch would save everything.
        self._blocks = [torch.from_numpy(block) for block in workload.source]
        self._pool = torch.from_numpy(workload.pool)

    def put(self) -> float:
        """Seconds to save every block, after those of the last round were deleted."""
        empty_folder(self._folder)
        started = time.perf_counter()
        for block, path in zip(self._blocks, self._paths, strict=True):
            torch.save(block, path)
        return time.perf_counter() - started

    def get(self) -> float:
        """Seconds to load every block into its slot; raises unless every byte is right."""
        self._work.clear_pool()
        started = time.perf_counter()
        for path, slot in zip(self._paths, self._work.slots, strict=True):
            self._pool[slot].copy_(torch.load(path, map_location="cpu"))
        seconds = time.perf_counter() - started
        self._work.check_pool()
        return seconds
