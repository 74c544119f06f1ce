"""The KV pool: one tensor, block-first, so that a slot is one contiguous run for the connector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared_cache.errors import ConfigError
from shared_cache.namespace import BlockLayout


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """New tokens of one sequence: `count` from position `start` on, over the slots `slots`."""

    start: int
    count: int
    slots: Sequence[int]

    @property
    def context(self) -> int:
        """Tokens that the last new token attends to."""
        return self.start + self.count

    @property
    def group_key(self) -> tuple[int, int]:
        """Spans with equal keys attend together: padding then less than doubles the work."""
        return self.count, self.context.bit_length()


class PagedPool:
    """The KV pool `[num_slots, layers, 2, kv_heads, tokens_per_block, head_dim]` and its views.

    `tensor` has the slots that may hold blocks. `with_scratch` has one more behind them, for the
    padding of fixed-size passes: what is written there, nobody reads.
    """

    def __init__(self, tensor: torch.Tensor, layout: BlockLayout, *, has_scratch: bool) -> None:
        self.num_slots = len(tensor) - has_scratch
        self.tensor = tensor[: self.num_slots]
        self.with_scratch = tensor
        self.layout = layout
        heads, tokens, head_dim = layout.num_kv_heads, layout.tokens_per_block, layout.head_dim
        # Row 0 of view l is K of head 0 of layer l in slot 0, so one index serves all layers.
        by_token, by_block = tensor.view(-1, head_dim), tensor.view(-1, tokens * head_dim)
        self.token_rows = [by_token[i * 2 * heads * tokens :] for i in range(layout.num_layers)]
        self.block_rows = [by_block[i * 2 * heads :] for i in range(layout.num_layers)]

    @property
    def scratch_slot(self) -> int:
        """The number of the slot behind all others; only in a pool that has one."""
        return self.num_slots

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of layer 0's view of blocks: `[2, kv_heads, *slots.shape]`."""
        layout = self.layout
        kv_and_head = torch.arange(2 * layout.num_kv_heads, device=slots.device)
        rows = slots * (layout.num_layers * 2 * layout.num_kv_heads)
        shape = [2, layout.num_kv_heads, *[1] * slots.dim()]
        return rows + kv_and_head.view(shape)


def allocate_pool(layout: BlockLayout, num_slots: int, device: str) -> PagedPool:
    """A zeroed pool; memory is taken as slots are first written where the system allows.

    On a GPU it has a scratch slot. Raises `ConfigError` with the size when the device has not that
    much memory.
    """
    has_scratch = torch.device(device).type == "cuda"
    shape = (num_slots + has_scratch, *layout.shape)
    try:
        tensor = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        raise ConfigError(
            f"a pool of {num_slots} blocks takes {num_slots * layout.block_bytes / 2**30:.1f} GiB, "
            f"which {device} does not have; lower engine.kv_cache_config.max_tokens"
        ) from error
    return PagedPool(tensor, layout, has_scratch=has_scratch)
