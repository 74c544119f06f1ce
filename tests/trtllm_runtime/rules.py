"""How one executor is set up. The names follow TensorRT-LLM's `llm_args` where there is one."""

from dataclasses import dataclass
from typing import Literal

from tests.trtllm_runtime.oracle import LAYOUT

SIZE = LAYOUT.tokens_per_block


@dataclass(frozen=True, slots=True)
class Rules:
    """`finish_rule`: P1 tells the connector of every request that ends, aborts and errors too; P2
    only of those that came to their end by themselves.

    `keeps_uncomputed`: when a request ends, all its tokens but the last are reusable on the device,
    however far it was computed, as upstream's own.
    `newest_first`: a block that was just freed is given away first.
    `lags`: the device works behind the host, as far as the loop does not wait for it.
    `cuda_graphs`: layer hooks fire only in turns that prefill. `is_later`: objects have what
    versions after 1.2 add.
    """

    num_blocks: int = 64
    max_batch_size: int = 8
    max_num_tokens: int = 4096
    enable_chunked_prefill: bool = False
    overlap: bool = False
    finish_rule: Literal["P1", "P2"] = "P2"
    partial_reuse: bool = False
    keeps_uncomputed: bool = True
    newest_first: bool = False
    lags: bool = False
    cuda_graphs: bool = False
    is_later: bool = False

    def __post_init__(self) -> None:
        assert not self.enable_chunked_prefill or self.max_num_tokens >= SIZE + self.max_batch_size


ALL_LOOPS = [
    Rules(overlap=overlap, finish_rule=finish_rule, lags=lags)
    for overlap in (False, True)
    for finish_rule in ("P1", "P2")
    for lags in (False, True)
]
"""Every loop there is, for tests that must hold in all of them."""


def loop_name(rules: Rules) -> str:
    """For test ids."""
    loop = "overlap" if rules.overlap else "plain"
    return "-".join([loop, rules.finish_rule, *(["lagging"] if rules.lags else [])])
