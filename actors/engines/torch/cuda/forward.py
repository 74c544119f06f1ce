"""The fast way to compute a turn on a GPU: fused layers over FlashInfer, short passes as graphs."""

import logging
import time
from collections.abc import Sequence

import torch

from actors.engines.torch.batch import NO_HOOKS, LayerHooks, PackedBatch, page_tables
from actors.engines.torch.cuda.buckets import PassSize, PassSizes
from actors.engines.torch.cuda.fused import FusedDecoder
from actors.engines.torch.cuda.graphs import CapturedPass
from actors.engines.torch.cuda.inputs import host_inputs, split_inputs
from actors.engines.torch.cuda.kernels import (
    WORKSPACE_BYTES,
    FlashInferAttention,
    FlashInferKernels,
)
from actors.engines.torch.forward import filled_in, logits_of
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.pool import PagedPool
from actors.engines.torch.to_device import send

logger = logging.getLogger(__name__)


class CudaForward:
    """Implements `Forward` on one GPU. `sizes` are captured by `warm_up`; None: no graphs.

    Passes of those sizes are quick to launch; without graphs no pass runs ahead.
    Layer hooks are not called in captured passes, as in TensorRT-LLM.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: PagedPool,
        max_positions: int,
        max_sequences: int,
        sizes: PassSizes | None,
    ) -> None:
        device = pool.tensor.device
        self.chosen = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self.runs_ahead = sizes is not None
        self._pool = pool
        self._lm_head = model.network.lm_head
        self._decoder = FusedDecoder(model.network, FlashInferKernels(), max_positions)
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._attention = FlashInferAttention(pool, self._decoder.num_heads, self._workspace)
        self._max_blocks = -(-max_positions // pool.layout.tokens_per_block)
        self._sizes = sizes
        self._captured: dict[PassSize, CapturedPass] = {}

    def warm_up(self) -> None:
        """See `Forward.warm_up`: captures all sizes."""
        start_s = time.monotonic()
        memory = torch.cuda.graph_pool_handle()
        for size in self._sizes.all if self._sizes is not None else ():
            self._captured[size] = CapturedPass(
                self._decoder,
                self._pool,
                self._workspace,
                size,
                self._max_blocks,
                memory,
                self.chosen,
            )
        torch.cuda.synchronize(self._pool.tensor.device)
        seconds = time.monotonic() - start_s
        logger.info("captured %d CUDA graphs in %.1f s", len(self._captured), seconds)

    def is_quick(self, counts: Sequence[int]) -> bool:
        """See `Forward.is_quick`."""
        return self._captured_for(counts) is not None

    def logits(self, batch: PackedBatch, hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """See `Forward.logits`."""
        captured = self._captured_for([span.count for span in batch.spans])
        hidden = self._hidden(batch, hooks) if captured is None else captured.hidden(batch)
        return logits_of(self._lm_head, hidden, batch.rows)

    def _captured_for(self, counts: Sequence[int]) -> CapturedPass | None:
        size = self._sizes.smallest(counts) if self._sizes is not None else None
        return self._captured.get(size) if size is not None else None

    def _hidden(self, batch: PackedBatch, hooks: LayerHooks) -> torch.Tensor:
        pool, num_spans = self._pool, len(batch.spans)
        block, total = pool.layout.tokens_per_block, len(batch.token_ids)
        tables = page_tables(batch.spans, block, total, num_spans, pool.scratch_slot)
        host = host_inputs(batch.token_ids, tables, batch.chosen_rows)
        packed = torch.empty_like(host, device=pool.tensor.device)
        send(host, packed)
        inputs = split_inputs(packed, total, num_spans)
        self._attention.plan(split_inputs(host, total, num_spans), inputs)
        token_ids = filled_in(inputs.token_ids, inputs.chosen_rows, self.chosen)
        return self._decoder.hidden(token_ids, inputs.positions, self._attention, hooks)
