"""Passes of fixed size as CUDA graphs: one launch instead of hundreds.

A pass over few tokens takes the device a few milliseconds and a host that launches kernel by kernel
many times that. What changes from pass to pass lies in fixed device memory and is copied there
before the graph is replayed.
"""

from typing import Any

import torch

from actors.engines.torch.batch import PackedBatch, page_tables
from actors.engines.torch.cuda.buckets import PassSize
from actors.engines.torch.cuda.fused import FusedDecoder
from actors.engines.torch.cuda.inputs import host_inputs, split_inputs
from actors.engines.torch.cuda.kernels import FlashInferAttention
from actors.engines.torch.forward import filled_in
from actors.engines.torch.pool import PagedPool, QuerySpan
from actors.engines.torch.to_device import send


class CapturedPass:
    """The decoder over at most `size.num_tokens` tokens of `size.num_sequences` sequences.

    `max_blocks` bounds the blocks of one sequence, `memory` is the graphs' shared memory pool, in
    `chosen` lies what the last pass chose.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        pool: PagedPool,
        workspace: torch.Tensor,
        size: PassSize,
        max_blocks: int,
        memory: Any,
        chosen: torch.Tensor,
    ) -> None:
        self._pool = pool
        self._chosen = chosen
        self._size = size
        self._num_sequences = size.num_sequences + 1  # padding belongs to the last one
        num_numbers = 4 * size.num_tokens + 3 * self._num_sequences + 2
        num_pages = size.num_sequences * max_blocks + 1
        self._numbers = torch.zeros(
            num_numbers + num_pages, dtype=torch.int32, device=workspace.device
        )
        self._inputs = split_inputs(self._numbers, size.num_tokens, self._num_sequences)
        self._attention = FlashInferAttention(pool, decoder.num_heads, workspace, self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        self._capture(decoder, memory)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """`[num_tokens, hidden]` of a batch that fits, padded; valid until the next pass."""
        self._prepare(batch)
        self._graph.replay()
        return self._hidden

    def _prepare(self, batch: PackedBatch) -> None:
        num_tokens, num_sequences = self._size.num_tokens, self._num_sequences
        block, scratch = self._pool.layout.tokens_per_block, self._pool.scratch_slot
        tables = page_tables(batch.spans, block, num_tokens, num_sequences, scratch)
        host = host_inputs(batch.token_ids, tables, batch.chosen_rows)
        send(host, self._numbers[: len(host)])
        self._attention.plan(split_inputs(host, num_tokens, num_sequences), self._inputs)

    def _capture(self, decoder: FusedDecoder, memory: Any) -> None:
        """Run once for what is initialised lazily, then again while the graph records."""
        self._prepare(self._full_batch())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(decoder)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._hidden = self._run(decoder)

    def _run(self, decoder: FusedDecoder) -> torch.Tensor:
        inputs = self._inputs
        token_ids = filled_in(inputs.token_ids, inputs.chosen_rows, self._chosen)
        return decoder.hidden(token_ids, inputs.positions, self._attention)

    def _full_batch(self) -> PackedBatch:
        """As many tokens as there can be, all in the scratch slot or from it on.

        FlashInfer takes the number of tokens of the first plan for the largest.
        """
        size, block = self._size, self._pool.layout.tokens_per_block
        num_short = min(size.num_sequences, size.num_tokens) - 1
        counts = [1] * num_short + [size.num_tokens - num_short]
        scratch = self._pool.scratch_slot
        spans = [QuerySpan(0, count, [scratch] * -(-count // block)) for count in counts]
        return PackedBatch([0] * size.num_tokens, spans, [])
