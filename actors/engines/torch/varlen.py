"""Attention by `torch.nn.attention.varlen`, which reads blocks where they lie: no gather.

Its block table came with torch 2.13. The kernel behind it decides which block sizes it takes, and
says so at the engine's first pass; the gathering pass takes all.
"""

import inspect
from collections.abc import Sequence

import torch
from torch.nn.attention.varlen import varlen_attn

from actors.engines.torch.attention import write_rows
from actors.engines.torch.batch import NO_HOOKS, LayerHooks, page_tables
from actors.engines.torch.pool import PagedPool, QuerySpan


def has_block_table() -> bool:
    """Whether this torch can attend over blocks."""
    return "block_table" in inspect.signature(varlen_attn).parameters


class VarlenPass:
    """An `AttentionPass` whose kernel follows a block table."""

    def __init__(
        self, pool: PagedPool, spans: Sequence[QuerySpan], hooks: LayerHooks = NO_HOOKS
    ) -> None:
        self._pool = pool
        self._hooks = hooks
        self._write_rows = write_rows(pool, spans)
        device, total = pool.tensor.device, sum(span.count for span in spans)
        tables = page_tables(spans, pool.layout.tokens_per_block, total, len(spans), 0)
        self._query_starts = torch.from_numpy(tables.query_starts).to(device)
        self._contexts = torch.tensor([s.context for s in spans], dtype=torch.int32, device=device)
        self._max_count = max(span.count for span in spans)
        self._max_context = max(span.context for span in spans)
        num_pages = -(-self._max_context // pool.layout.tokens_per_block)
        rows = [[*s.slots[:num_pages], *[0] * (num_pages - len(s.slots))] for s in spans]
        self._block_table = torch.tensor(rows, dtype=torch.int32, device=device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `AttentionPass.attend`."""
        self._hooks.before(layer)
        fresh = torch.cat((key, value)).reshape(-1, query.shape[-1])
        self._pool.token_rows[layer].index_copy_(0, self._write_rows, fresh)
        # [slots, 2, kv_heads, tokens, head_dim] -> [slots, tokens, kv_heads, head_dim] each
        keys, values = self._pool.tensor[:, layer].transpose(2, 3).unbind(1)
        output = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            keys,
            values,
            self._query_starts,
            None,
            self._max_count,
            self._max_context,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self._contexts,
            block_table=self._block_table,
        )
        assert isinstance(output, torch.Tensor)
        self._hooks.after(layer)
        return output.unsqueeze(0)
