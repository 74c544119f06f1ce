"""Puts and gets the workload with LMCache's own back ends, in the environment made for it.

One JSON object a line: `{"cmd": "start", "folder": ..., "block_bytes": ..., "num_blocks": ...,
"seed": ...}`, then `{"cmd": "put" | "get", "backend": "local_cpu" | "local_disk" | "fs"}`, each
answered with `{"seconds": ...}` or `{"error": ...}`; ends with its input.

What is timed is what LMCache's engine does on a CPU for the prefix of each request: put = allocate
memory objects, copy the blocks into them, submit them, wait until they are stored; get = get the
memory objects, copy them into the slots, let them go. Deleting what the last put
has left, and comparing the bytes, is not timed.
"""

import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector.fs_connector import FSConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

from benchmarks.rivals.workload import Workload

TOKENS_PER_BLOCK = 32
NUM_IN_FLIGHT = 32
DISK_GIB = 64.0
STORE_S = 60.0


class Bench:
    """What all back ends share: the bytes, their keys, and how LMCache is told of blocks."""

    def __init__(self, folder: Path, work: Workload) -> None:
        self.folder = folder
        self.work = work
        self.keys = [
            CacheEngineKey("benchmark", 1, 0, number + 1, torch.bfloat16)
            for number in range(work.num_blocks)
        ]
        per_token = work.block_bytes // (2 * TOKENS_PER_BLOCK * torch.bfloat16.itemsize)
        self.metadata = LMCacheMetadata(
            model_name="benchmark",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(1, 2, TOKENS_PER_BLOCK, 1, per_token),
            chunk_size=TOKENS_PER_BLOCK,
        )
        self.shape = self.metadata.get_shapes()[0]
        if 2 * self.shape.numel() != work.block_bytes:
            raise ValueError(f"{work.block_bytes} bytes are no block of {TOKENS_PER_BLOCK} tokens")

    def config(self, keep_in_memory: bool) -> LMCacheEngineConfig:
        """LMCache's defaults, with memory for all blocks and an eighth more."""
        return LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS_PER_BLOCK,
            local_cpu=keep_in_memory,
            max_local_cpu_size=1.125 * self.work.source.nbytes / 2**30,
            local_disk=str(self.folder / "local_disk"),
            max_local_disk_size=DISK_GIB,
        )

    def filled(self, memory: LocalCPUBackend, blocks: Sequence[int]) -> list[Any]:
        """Memory objects with the bytes of these blocks."""
        objects = []
        for block in blocks:
            memory_object = memory.allocate(self.shape, torch.bfloat16, busy_loop=False)
            if memory_object is None:
                raise RuntimeError("LMCache has no memory left")
            target = np.frombuffer(memory_object.byte_array, np.uint8)
            np.copyto(target, self.work.source[block])
            objects.append(memory_object)
        return objects

    def take(self, block: int, memory_object: Any) -> None:
        """Copy a block into its slot, and let it go."""
        if memory_object is None:
            raise RuntimeError(f"LMCache lost block {block}")
        slot = self.work.pool[self.work.slots[block]]
        np.copyto(slot, np.frombuffer(memory_object.byte_array, np.uint8))
        memory_object.ref_count_down()


class LocalCpu:
    """LMCache's memory."""

    def __init__(self, bench: Bench, loop: asyncio.AbstractEventLoop) -> None:
        self._bench = bench
        self._backend = LocalCPUBackend(bench.config(True), bench.metadata)

    def forget(self) -> None:
        for key in self._bench.keys:
            self._backend.remove(key)

    def put(self, blocks: range) -> None:
        objects = self._bench.filled(self._backend, blocks)
        keys = self._bench.keys[blocks.start : blocks.stop]
        self._backend.batched_submit_put_task(keys, objects)
        for memory_object in objects:
            memory_object.ref_count_down()

    def finish(self) -> None:
        pass

    def get(self, blocks: range) -> None:
        for block in blocks:
            self._bench.take(block, self._backend.get_blocking(self._bench.keys[block]))


class LocalDisk:
    """LMCache's files, one for each block."""

    def __init__(self, bench: Bench, loop: asyncio.AbstractEventLoop) -> None:
        config = bench.config(False)
        self._bench = bench
        self._memory = LocalCPUBackend(config, bench.metadata)
        self._backend = LocalDiskBackend(
            config, loop, self._memory, dst_device="cpu", metadata=bench.metadata
        )
        self._stored = threading.Semaphore(0)

    def forget(self) -> None:
        for key in self._bench.keys:
            if self._backend.contains(key):
                self._backend.current_cache_size -= self._backend.dict[key].size
                self._backend.remove(key)

    def put(self, blocks: range) -> None:
        objects = self._bench.filled(self._memory, blocks)
        keys = self._bench.keys[blocks.start : blocks.stop]
        self._backend.batched_submit_put_task(
            keys, objects, on_complete_callback=lambda key: self._stored.release()
        )
        for memory_object in objects:
            memory_object.ref_count_down()

    def finish(self) -> None:
        for _ in self._bench.keys:
            if not self._stored.acquire(timeout=STORE_S):
                raise RuntimeError("LMCache did not store every block")

    def get(self, blocks: range) -> None:
        keys = self._bench.keys[blocks.start : blocks.stop]
        for block, found in zip(blocks, self._backend.batched_get_blocking(keys), strict=True):
            self._bench.take(block, found)


class Fs:
    """LMCache's fs:// connector: a file for each block, published by renaming it."""

    def __init__(self, bench: Bench, loop: asyncio.AbstractEventLoop) -> None:
        config = bench.config(False)
        self._bench = bench
        self._loop = loop
        self._memory = LocalCPUBackend(config, bench.metadata)
        folder = str(bench.folder / "fs")
        self._connector = FSConnector(loop, self._memory, config, base_paths_str=folder)

    def forget(self) -> None:
        for key in self._bench.keys:
            if self._connector.exists_sync(key):
                self._connector.remove_sync(key)

    def put(self, blocks: range) -> None:
        objects = self._bench.filled(self._memory, blocks)
        keys = self._bench.keys[blocks.start : blocks.stop]
        self._together([self._connector.put(k, o) for k, o in zip(keys, objects, strict=True)])
        for memory_object in objects:
            memory_object.ref_count_down()

    def finish(self) -> None:
        pass

    def get(self, blocks: range) -> None:
        keys = self._bench.keys[blocks.start : blocks.stop]
        objects = self._together([self._connector.get(key) for key in keys])
        for block, memory_object in zip(blocks, objects, strict=True):
            self._bench.take(block, memory_object)

    def _together(self, calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        async def all_calls() -> list[Any]:
            in_flight = asyncio.Semaphore(NUM_IN_FLIGHT)

            async def one(call: Coroutine[Any, Any, Any]) -> Any:
                async with in_flight:
                    return await call

            return await asyncio.gather(*map(one, calls))

        return asyncio.run_coroutine_threadsafe(all_calls(), self._loop).result()


MAKERS = {"local_cpu": LocalCpu, "local_disk": LocalDisk, "fs": Fs}


class Server:
    """Back ends are made when they are first used."""

    def __init__(self, request: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        work = Workload(request["block_bytes"], request["num_blocks"], request["seed"])
        self._bench = Bench(Path(request["folder"]), work)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._backends: dict[str, Any] = {}

    def seconds(self, request: dict[str, Any]) -> float:
        """Do what is asked."""
        name = request["backend"]
        if name not in self._backends:
            self._backends[name] = MAKERS[name](self._bench, self._loop)
        backend, work = self._backends[name], self._bench.work
        if request["cmd"] == "put":
            backend.forget()
            return timed(lambda: put_all(backend, work))
        work.clear_pool()
        seconds = timed(lambda: get_all(backend, work))
        work.check_pool()
        return seconds


def put_all(backend: Any, work: Workload) -> None:
    for blocks in work.prefixes():
        backend.put(blocks)
    backend.finish()


def get_all(backend: Any, work: Workload) -> None:
    for blocks in work.prefixes():
        backend.get(blocks)


def timed(run: Callable[[], None]) -> float:
    """Seconds that the call took, the collector kept out of it."""
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        run()
        return time.perf_counter() - started
    finally:
        gc.enable()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what LMCache prints is no answer
    server: Server | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if server is None:
                server = Server(request)
                answer = {"versions": {"torch": torch.__version__, "numpy": np.__version__}}
            else:
                answer = {"seconds": server.seconds(request)}
        except Exception as error:  # whatever it is, the caller is to know of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # LMCache's threads would keep the process


if __name__ == "__main__":
    main()
