"""The decoder for GPUs against transformers' layers, its kernels replaced by plain torch."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.torch.attention import PagedPass
from actors.engines.torch.batch import PackedBatch, page_tables
from actors.engines.torch.cuda.buckets import PassSize, PassSizes, token_steps
from actors.engines.torch.cuda.fused import FusedDecoder
from actors.engines.torch.cuda.inputs import host_inputs, split_inputs
from actors.engines.torch.forward import PlainForward, logits_of
from actors.engines.torch.model import block_layout, load_model
from actors.engines.torch.pool import PagedPool, QuerySpan, allocate_pool
from tests.engine.conftest import BLOCK, ModelPath, some_prompt
from tests.engine.reference_kernels import GatheringAttention, ReferenceKernels
from tests.tiny_model import FAMILIES, tiny_source

WITH_BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in FAMILIES), ("llama", WITH_BIASES)]
)
@torch.inference_mode()
def test_it_computes_what_transformers_layers_do(
    family: str, changes: dict[str, object], model_path: ModelPath
) -> None:
    model = load_model(tiny_source(model_path(family, **changes)))
    layout = block_layout(model.config, BLOCK, "float32")
    pools = [allocate_pool(layout, 12, "cpu") for _ in range(2)]
    plain = PlainForward(model, pools[0])
    expected = [plain.logits(batch) for batch in batches()]
    # Packing makes the modules' own weights views: what they compute must stay the same.
    decoder = FusedDecoder(model.network, ReferenceKernels(), 64)
    for batch, logits in zip(batches(), expected, strict=True):
        paged = PagedPass(pools[1], batch.spans)
        attention = GatheringAttention(paged, 1 / math.sqrt(layout.head_dim))
        tokens, positions = torch.tensor(batch.token_ids), torch.tensor(batch.positions)
        hidden = decoder.hidden(tokens, positions, attention)
        found = logits_of(model.network.lm_head, hidden, batch.rows)
        torch.testing.assert_close(found, logits, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(plain.logits(batch), logits)
    torch.testing.assert_close(pools[1].tensor, pools[0].tensor, rtol=2e-3, atol=2e-3)


def batches() -> list[PackedBatch]:
    """Two prompts, then a token of the one and more of the other."""
    first, second = some_prompt(19, seed=1), some_prompt(9, seed=2)
    slots = ((3, 1, 4), (7, 5, 2))
    return [
        PackedBatch(first[:18], [QuerySpan(0, 18, slots[0])], [17]),
        PackedBatch(second[:4], [QuerySpan(0, 4, slots[1])], []),
        PackedBatch(
            [*first[18:], *second[4:]],
            [QuerySpan(18, 1, slots[0]), QuerySpan(4, 5, slots[1])],
            [0, 5],
        ),
    ]


def test_a_pool_with_a_scratch_slot_hands_out_all_but_that(model_path: ModelPath) -> None:
    layout = block_layout(load_model(tiny_source(model_path())).config, BLOCK, "float32")
    pool = PagedPool(torch.zeros((5, *layout.shape)), layout, has_scratch=True)
    assert (pool.num_slots, len(pool.tensor), len(pool.with_scratch)) == (4, 4, 5)
    assert pool.scratch_slot == 4
    assert pool.tensor.is_contiguous()


@st.composite
def spans(draw: st.DrawFn) -> list[QuerySpan]:
    """Sequences with slots of their own, more of them than they need."""
    found, next_slot = [], 0
    for _ in range(draw(st.integers(1, 5))):
        start, count = draw(st.integers(0, 20)), draw(st.integers(1, 9))
        num_slots = -(-(start + count) // 4) + draw(st.integers(0, 2))
        found.append(QuerySpan(start, count, range(next_slot, next_slot + num_slots)))
        next_slot += num_slots
    return found


@given(spans(), st.integers(0, 5), st.integers(0, 3))
def test_every_token_is_written_where_its_sequence_has_it(
    found: list[QuerySpan], more_tokens: int, more_sequences: int
) -> None:
    total, scratch = sum(span.count for span in found), 1000
    num_tokens = total + (more_tokens if more_sequences else 0)
    num_sequences = len(found) + more_sequences
    tables = page_tables(found, 4, num_tokens, num_sequences, scratch)
    expected = [
        (index, position, span.slots[position // 4])
        for index, span in enumerate(found)
        for position in range(span.start, span.context)
    ]
    written = []
    for sequence, position in zip(tables.token_sequences, tables.positions, strict=True):
        pages = tables.page_ids[tables.page_starts[sequence] : tables.page_starts[sequence + 1]]
        written.append((int(sequence), int(position), int(pages[position // 4])))
    assert written[:total] == expected
    assert all(slot == scratch for _, _, slot in written[total:])
    pages_of = np.diff(tables.page_starts)
    contexts = (pages_of - 1) * 4 + tables.last_page_tokens
    assert contexts.tolist() == [span.context for span in found] + [1] * more_sequences
    assert np.diff(tables.query_starts).tolist() == [s.count for s in found] + [0] * more_sequences


@given(spans(), st.integers(0, 4))
def test_packed_inputs_come_apart_as_they_were(found: list[QuerySpan], more: int) -> None:
    total = sum(span.count for span in found)
    tables = page_tables(found, 4, total + more, len(found) + 1, 1000)
    tokens = list(range(total))
    inputs = split_inputs(host_inputs(tokens, tables), total + more, len(found) + 1)
    assert inputs.token_ids.tolist() == tokens + [0] * more
    for name in ("token_sequences", "positions", "query_starts", "page_starts", "page_ids"):
        assert getattr(inputs, name).tolist() == getattr(tables, name).tolist()
    assert inputs.last_page_tokens.tolist() == tables.last_page_tokens.tolist()


@pytest.mark.parametrize("most", [1, 2, 7, 16, 64, 100, 512])
def test_steps_go_up_to_the_most(most: int) -> None:
    steps = token_steps(most)
    assert steps[0] == 1
    assert steps[-1] == most
    assert steps == sorted(set(steps))
    assert all(after <= 2 * before for before, after in itertools.pairwise(steps))


@given(st.integers(1, 80), st.integers(1, 600), st.lists(st.integers(1, 40), min_size=1))
def test_a_pass_gets_the_size_that_it_fits_or_none(
    max_sequences: int, more: int, counts: list[int]
) -> None:
    max_tokens = max_sequences + more
    sizes = PassSizes(max_sequences, max_tokens)
    size = sizes.smallest(counts)
    fits = sum(counts) <= max_tokens and len(counts) <= max_sequences
    assert (size is not None) == fits
    if size is not None:
        assert size in sizes.all
        assert size.num_tokens >= sum(counts)
        assert size.num_sequences >= len(counts)
        assert size.num_tokens < 2 * sum(counts) or sum(counts) < 3


def test_decoding_is_padded_little() -> None:
    sizes = PassSizes(64, 256)
    assert sizes.smallest([1] * 17) == PassSize(24, 24)
    assert sizes.smallest([1]) == PassSize(1, 1)
    assert sizes.smallest([33, 1]) == PassSize(40, 8)
    assert sizes.smallest([200, 60]) is None
    assert len(sizes.all) < 60
