"""The connector's worker side: a turn's transfer plan becomes copies.

Loads come from leased host slots, so they cannot miss; saves go to reserved host slots and from
there, behind the engine's back, to the shared tier. Nothing here waits for a store. What it
prevents: blocks of the wrong size written over a pool, and a forward pass over blocks that are
still on their way.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from shared_cache.connector.copier import make_copier
from shared_cache.connector.copies import BlockCopier, BlockLoad, BlockSave, OnLoaded
from shared_cache.connector.pool_check import check_pool
from shared_cache.connector.transfers import PackedLoads, SaveRun, TransferPlan
from shared_cache.errors import ConfigError
from shared_cache.faults import FaultLog
from shared_cache.host.interface import NewRun
from shared_cache.namespace import BlockLayout
from shared_cache.staging import SharedCache

logger = logging.getLogger(__name__)

ReservedRun = tuple[SaveRun, tuple[int, ...]]
"""A run and the host slots for its leading blocks."""


class SharedCacheWorker:
    """Implements `KvCacheConnectorWorker` on one rank, over that rank's shard of the cache.

    All hooks are called on the engine's loop thread. Errors of saves are counted and logged, never
    raised. An error of a load is raised from `start_load_kv`: the engine counts those tokens as
    computed, and going on would answer from garbage, for this request and for all that reuse its
    blocks. As loads copy leased memory, only a broken device or deleted memory can cause one.
    """

    def __init__(
        self,
        cache: SharedCache,
        rank: int = 0,
        layout: BlockLayout | None = None,
        *,
        is_told_of_writes: bool = False,
    ) -> None:
        """`layout` is what the pool must be, axis by axis; None: only its bytes are compared.

        An engine that calls `before_writes` says so by `is_told_of_writes`; for any other one,
        every turn waits for the saves of the turns before it.
        """
        self.on_loaded: OnLoaded | None = None
        """Called when an asynchronous load is done, by any thread, for who need not poll then."""
        self._cache = cache
        self._is_told_of_writes = is_told_of_writes
        self._loading: dict[int, Callable[[], bool]] = {}
        self._awaited: set[int] = set()
        self._ended: set[int] = set()
        self._let_go: set[int] = set()
        self._rank = rank
        self._layout = layout
        self._faults = FaultLog(logger)
        self._copier: BlockCopier | None = None
        self._plan = TransferPlan()

    @property
    def connector_faults(self) -> int:
        """Errors that were kept from the engine since the start."""
        return self._faults.num_faults

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Take the engine's pool, `[num_blocks, ...]`, one contiguous row per block.

        Raises `ConfigError` when its blocks are not those of the cache's namespace.
        """
        if self._layout is not None:
            check_pool(
                tuple(kv_cache_tensor.shape),
                str(kv_cache_tensor.dtype).removeprefix("torch."),
                self._layout,
                is_contiguous=kv_cache_tensor.is_contiguous(),
            )
        if kv_cache_tensor.dim() < 2 or not kv_cache_tensor.is_contiguous():
            raise ConfigError(
                f"the KV pool must be contiguous with blocks first, not of shape "
                f"{tuple(kv_cache_tensor.shape)} and strides {kv_cache_tensor.stride()}; "
                "use the engine's default KV cache manager"
            )
        num_blocks = kv_cache_tensor.shape[0]
        pool_block_bytes = kv_cache_tensor.nbytes // num_blocks
        block_bytes = self._cache.host.block_bytes
        if pool_block_bytes != block_bytes:
            raise ConfigError(
                f"a block of the engine's KV pool has {pool_block_bytes} bytes, one of the cache's "
                f"namespace {block_bytes}; set tokens_per_block and the KV dtype explicitly: the "
                "engine may have replaced them (FlashMLA uses 64 tokens per block)"
            )
        rows = kv_cache_tensor.detach().view(num_blocks, -1).view(torch.uint8)
        self._copier = make_copier(rows)
        self._cache.host.show_memory(self._copier.prepare)

    def bind_connector_meta(self, metadata: object) -> None:
        """Take this turn's plan; anything else (an engine's warm-up) means nothing to do."""
        self._plan = metadata if isinstance(metadata, TransferPlan) else TransferPlan()

    def start_load_kv(self, stream: Any) -> None:
        """Copy the plan's loads into the pool, ordered before the forward pass on `stream`.

        Before that, what ended requests have left to save. Raises `RuntimeError` when the plan says
        that this turn must not run: on every rank, as all have the same plan.
        """
        if self._plan.refusal:
            raise RuntimeError(
                f"the KV connector promised tokens that cannot be loaded ({self._plan.refusal}); "
                "the engine stops, as it would answer from garbage: restart it, and report this"
            )
        self._let_go.update(self._plan.let_go)
        if self._plan.early_saves and self._copier is not None:
            with self._faults.caught("the save hook"):
                self._save(self._copier, self._plan.early_saves, stream)
        if self._copier is None:
            if self._plan.packed_loads or self._plan.loads_ahead:
                raise RuntimeError("start_load_kv before register_kv_caches")
            return
        if not self._is_told_of_writes:
            self._copier.before_writes(None, stream)
        self._copier.load(self._copies(self._plan.packed_loads), stream)
        for request_id, loads in self._plan.loads_ahead:
            self._loading[request_id] = self._copier.load_beside(
                self._copies(loads), stream, self.on_loaded
            )

    def before_writes(self, blocks: Collection[int], stream: Any) -> None:
        """The engine will write to these device blocks, or have them loaded, from now on.

        Not one of TensorRT-LLM's hooks: see `is_told_of_writes`. To be called before
        `start_load_kv`, with every block that was free before.
        """
        if self._copier is not None:
            self._copier.before_writes(blocks, stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing: a block holds all layers, and `stream` waits for all of them."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing: a block holds all layers, so it is saved when the last one is computed."""

    def wait_for_save(self, stream: Any) -> None:
        """Start to save what the forward pass on `stream` completes; waits for no copy on CUDA."""
        saves, self._plan = self._plan.saves, TransferPlan()
        if saves and self._copier is not None:
            with self._faults.caught("the save hook"):
                self._save(self._copier, saves, stream)

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """The ended requests whose blocks nothing will touch any more, and the loads that are done.

        Both lists hold ids that were handed in, in this call or an earlier one, each once. A save
        that is still reading blocks counts as done: see `before_writes`.
        """
        self._ended.update(finished_gen_req_ids)
        self._awaited.update(started_loading_req_ids)
        done = [one for one, is_done in self._loading.items() if is_done()]
        loading = [one for one in done if one in self._awaited and one not in self._ended]
        for request_id in loading:
            self._awaited.discard(request_id)
            del self._loading[request_id]
        free = self._ended & self._let_go
        ended = [one for one in free if one not in self._loading or one in done]
        for request_id in ended:
            self._ended.discard(request_id)
            self._let_go.discard(request_id)
            self._awaited.discard(request_id)
            self._loading.pop(request_id, None)
        return ended, loading

    def close(self) -> None:
        """Finish the copies that are under way and let go of the pool; again is a no-op."""
        copier, self._copier = self._copier, None
        if copier is not None:
            copier.close()

    def _copies(self, packed: Sequence[PackedLoads]) -> list[BlockLoad]:
        loads = (loads.of_rank(self._rank) for loads in packed)
        return [
            BlockLoad(self._cache.host.blocks_at(load.place), load.device_blocks) for load in loads
        ]

    def _save(self, copier: BlockCopier, saves: Sequence[SaveRun], stream: Any) -> None:
        reserved: list[ReservedRun] = []
        copies: list[BlockSave] = []
        try:
            for run in saves:
                slots = self._cache.reserve(run.num_blocks)
                reserved.append((run, slots))
                buffers = map(self._cache.host.buffer, slots)
                copies += zip(buffers, run.device_blocks, run.hashes, strict=False)
        except BaseException:
            self._give_back(reserved)
            raise
        copied, failed = partial(self._copied, reserved), partial(self._failed, reserved)
        copier.save(copies, stream, copied, failed)

    def _copied(
        self, reserved: list[ReservedRun], seconds: float, checksums: Sequence[int]
    ) -> None:
        """Publish run after run, each taken out of `reserved` before; none stops the next one."""
        self._cache.turn_budget.saw_copies(len(checksums), seconds)
        done = 0
        try:
            while reserved:
                run, slots = reserved.pop(0)
                if slots:
                    with self._faults.caught("publishing a save"):
                        self._publish_run(run, slots, tuple(checksums[done : done + len(slots)]))
                done += len(slots)
        except BaseException:  # an interrupt: what is not published yet is still ours
            self._give_back(reserved)
            raise

    def _failed(self, reserved: list[ReservedRun], error: Exception) -> None:
        self._faults.record("copying blocks to host memory", error)
        self._give_back(reserved)

    def _give_back(self, reserved: list[ReservedRun]) -> None:
        """Nothing is written to these slots any more; their blocks count as dropped."""
        slots = [slot for _, slots in reserved for slot in slots]
        reserved.clear()
        self._cache.give_back(slots)

    def _publish_run(
        self, run: SaveRun, slots: tuple[int, ...], checksums: tuple[int, ...]
    ) -> None:
        try:
            hashes = run.hashes[: len(slots)]
            new = NewRun(run.parent, hashes, run.tenant, checksums=checksums)
            self._cache.save(slots, new, run.first)
        except BaseException:
            self._cache.give_back(slots)  # what was not taken over is still ours
            raise
