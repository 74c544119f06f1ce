"""One packed forward pass in numbers: which tokens, of which sequences, and whose logits.

Every turn is one packed row of tokens of many sequences. What a pass over the paged pool needs to
know of it is worked out here, apart from the kernels that use it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.engines.torch.pool import QuerySpan

Ints = npt.NDArray[np.int32]


def _no_layer_hook(layer: int) -> None:
    """Layers are not watched."""


@dataclass(frozen=True, slots=True)
class LayerHooks:
    """What is called with a layer's number before its KV is used and after it was written."""

    before: Callable[[int], None] = _no_layer_hook
    after: Callable[[int], None] = _no_layer_hook


NO_HOOKS = LayerHooks()


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`token_ids` of all `spans`, one behind the other; logits are wanted of `rows`.

    Where `chosen_rows[i]` is not negative, token i is not known: the last pass chose it for its row
    of that number. Empty: all are known.
    """

    token_ids: Sequence[int]
    spans: Sequence[QuerySpan]
    rows: Sequence[int]
    chosen_rows: Sequence[int] = ()

    @property
    def positions(self) -> list[int]:
        """Each token's place in its sequence."""
        return [position for span in self.spans for position in range(span.start, span.context)]


@dataclass(frozen=True, slots=True)
class PageTables:
    """Where a pass reads and writes, in FlashInfer's words; a page is a block of the pool.

    Sequence i has the tokens `query_starts[i]` to `query_starts[i + 1]` and the pages
    `page_ids[page_starts[i]]` to `page_ids[page_starts[i + 1]]`, `last_page_tokens[i]` tokens in
    the last one. Token t is written for sequence `token_sequences[t]` at place `positions[t]`.
    """

    query_starts: Ints
    page_starts: Ints
    page_ids: Ints
    last_page_tokens: Ints
    token_sequences: Ints
    positions: Ints


def page_tables(
    spans: Sequence[QuerySpan],
    tokens_per_block: int,
    num_tokens: int,
    num_sequences: int,
    scratch_slot: int,
) -> PageTables:
    """The tables of a pass of fixed size: `num_tokens` tokens of `num_sequences` sequences.

    Sequences beyond `spans` have no tokens, and one token of context in `scratch_slot`. Tokens
    beyond those of `spans` are written there, as the last sequence's; so if there are any, there
    must be a sequence beyond `spans`.
    """
    num_spans = len(spans)
    counts = np.zeros(num_sequences, np.int32)
    contexts = np.ones(num_sequences, np.int32)
    counts[:num_spans] = [span.count for span in spans]
    contexts[:num_spans] = [span.context for span in spans]
    num_pages = -(-contexts // tokens_per_block)
    pages = [
        np.asarray(span.slots[:count], np.int32)
        for span, count in zip(spans, num_pages.tolist(), strict=False)
    ]
    pages.append(np.full(num_sequences - num_spans, scratch_slot, np.int32))
    positions = np.zeros(num_tokens, np.int32)
    token_sequences = np.full(num_tokens, num_sequences - 1, np.int32)
    total = int(counts.sum())
    query_starts = _starts(counts)
    token_sequences[:total] = np.repeat(np.arange(num_sequences, dtype=np.int32), counts)
    first_positions = contexts - counts - query_starts[:-1]
    positions[:total] = np.arange(total, dtype=np.int32) + np.repeat(first_positions, counts)
    return PageTables(
        query_starts=query_starts,
        page_starts=_starts(num_pages),
        page_ids=np.concatenate(pages),
        last_page_tokens=(contexts - 1) % tokens_per_block + 1,
        token_sequences=token_sequences,
        positions=positions,
    )


def _starts(counts: Ints) -> Ints:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
