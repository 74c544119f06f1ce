"""Attention over the paged pool, as a transformers attention function.

Every turn is one packed row of tokens of many sequences, so the linear layers, which dominate, see
one large matrix. Here the row is taken apart again: new K and V go into their slots, and each group
of alike sequences (same number of new tokens, similar context) attends in one call over its blocks,
gathered by one `index_select`. The pool is block-first, so a slot is one contiguous run for the
connector; the gather turns that into the order that attention wants while it copies.

Everything a pass needs travels in `PagedPass` through the model's keyword arguments: engines in one
process share nothing but the registration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.engines.torch.batch import NO_HOOKS, LayerHooks
from actors.engines.torch.pool import PagedPool, QuerySpan

ATTENTION_NAME = "kvcommons_paged"


@dataclass(frozen=True, slots=True)
class _Group:
    """Spans that attend in one call; they lie side by side in the packed row."""

    first: int
    num_spans: int
    count: int
    context: int
    rows: torch.Tensor
    mask: torch.Tensor | None
    causal: bool


class AttentionPass(Protocol):
    """What one forward pass reads and writes in the pool."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`[1, total, heads, head_dim]` from packed `[1, heads, total, head_dim]` inputs."""


class PagedPass:
    """The pass that gathers each group's blocks and attends with torch's own function.

    `spans` are the new tokens in packed order, spans with equal `group_key` side by side.
    """

    def __init__(
        self,
        pool: PagedPool,
        spans: Sequence[QuerySpan],
        hooks: LayerHooks = NO_HOOKS,
    ) -> None:
        self.pool = pool
        self._hooks = hooks
        self._write_rows = write_rows(pool, spans)
        self._groups = list(_groups(pool, spans))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `AttentionPass.attend`."""
        self._hooks.before(layer)
        head_dim = query.shape[-1]
        token_rows = self.pool.token_rows[layer]
        # [2, kv_heads, total, head_dim], as _write_rows are ordered.
        fresh = torch.cat((key, value)).reshape(-1, head_dim)
        token_rows.index_copy_(0, self._write_rows, fresh)
        outputs = [self._attend_group(layer, group, query, scale) for group in self._groups]
        self._hooks.after(layer)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _attend_group(
        self, layer: int, group: _Group, query: torch.Tensor, scale: float
    ) -> torch.Tensor:
        layout, size = self.pool.layout, group.num_spans * group.count
        gathered = self.pool.block_rows[layer].index_select(0, group.rows)
        kv = gathered.view(2, group.num_spans, layout.num_kv_heads, -1, layout.head_dim)
        kv = kv[:, :, :, : group.context]
        queries = query[0, :, group.first : group.first + size]
        shape = (query.shape[1], group.num_spans, group.count, layout.head_dim)
        queries = queries.reshape(shape).transpose(0, 1)
        output = functional.scaled_dot_product_attention(
            queries,
            kv[0],
            kv[1],
            attn_mask=group.mask,
            is_causal=group.causal,
            scale=scale,
            enable_gqa=True,
        )
        return output.transpose(1, 2).reshape(size, query.shape[1], layout.head_dim)


def write_rows(pool: PagedPool, spans: Sequence[QuerySpan]) -> torch.Tensor:
    """Rows of layer 0's token view for every new token: flat `[2, kv_heads, total]`."""
    block = pool.layout.tokens_per_block
    device = pool.tensor.device
    positions = torch.cat([torch.arange(s.start, s.context, device=device) for s in spans])
    slots = [s.slots[p // block] for s in spans for p in range(s.start, s.context)]
    rows = pool.rows_of(torch.tensor(slots, device=device))
    return (rows * block + positions % block).reshape(-1)


def _groups(pool: PagedPool, spans: Sequence[QuerySpan]) -> list[_Group]:
    groups, first, start = [], 0, 0
    while start < len(spans):
        end = start + 1
        while end < len(spans) and spans[end].group_key == spans[start].group_key:
            end += 1
        groups.append(_group(pool, spans[start:end], first))
        first += (end - start) * spans[start].count
        start = end
    return groups


def _group(pool: PagedPool, spans: Sequence[QuerySpan], first: int) -> _Group:
    device, layout = pool.tensor.device, pool.layout
    context, count = max(s.context for s in spans), spans[0].count
    num_blocks = -(-context // layout.tokens_per_block)
    # A shorter sequence repeats its first slot where the longest one has blocks: masked.
    tables = [
        [s.slots[i] if i < len(s.slots) else s.slots[0] for i in range(num_blocks)] for s in spans
    ]
    # [spans, blocks] -> [2, kv_heads, spans, blocks] -> [2, spans, kv_heads, blocks]
    rows = pool.rows_of(torch.tensor(tables, device=device)).transpose(1, 2).reshape(-1)
    causal = count > 1 and context == count
    exact = count == 1 and all(s.context == context for s in spans)
    mask = None if causal or exact else _mask(pool, spans, context)
    return _Group(first, len(spans), count, context, rows, mask, causal)


def _mask(pool: PagedPool, spans: Sequence[QuerySpan], context: int) -> torch.Tensor:
    """Additive `[spans, 1, count, context]`: each new token sees itself and all before it."""
    device = pool.tensor.device
    starts = torch.tensor([s.start for s in spans], device=device)
    last_seen = starts[:, None] + torch.arange(spans[0].count, device=device)
    hidden = torch.arange(context, device=device) > last_seen[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=pool.tensor.dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: AttentionPass,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every layer; masks are the pass's business."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return paged.attend(layer, query, key, value, scaling), None


# Without a mask function of the same name, transformers builds no mask.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
