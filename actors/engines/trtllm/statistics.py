"""TensorRT-LLM's iteration statistics -> the snapshot that every engine gives. Pure.

Entries come late, in groups, or not at all where somebody switched them off; a field may be missing
in another version. So nothing but the figures that only TensorRT-LLM knows is taken from them, and
what this side can count (requests, tokens) is counted here. Its counters of reused blocks know the
engine's own tree alone: blocks that the connector loaded are missed there, and moved here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.engine import EngineStats, KvCacheStats, Receipt


@dataclass(slots=True)
class RequestCounts:
    """What this side counts of its requests; one event loop writes it."""

    num_waiting: int = 0
    num_running: int = 0
    prefill_tokens: int = 0
    loaded_blocks: int = 0
    generated_tokens: int = 0
    accepted_draft_tokens: int = 0
    num_outputs: int = 0
    num_arrived: int = 0


class Statistics:
    """The figures of one engine since its start.

    `max_num_blocks` is believed until TensorRT-LLM says how many its pool has.
    """

    def __init__(self, tokens_per_block: int, max_num_blocks: int = 0) -> None:
        self.counts = RequestCounts()
        self.num_malformed = 0
        self._tokens_per_block = tokens_per_block
        self._kv: Mapping[str, Any] = {
            "maxNumBlocks": max_num_blocks,
            "freeNumBlocks": max_num_blocks,
        }
        self._turns = self._outputs_before = 0
        self._proposed = 0

    def take(self, entry: Any) -> None:
        """Note one entry of `get_stats`; one that is none is counted, and not raised."""
        try:
            self._take(json.loads(entry) if isinstance(entry, str) else entry)
        except (TypeError, ValueError, AttributeError):
            self.num_malformed += 1

    def started(self, receipt: Receipt) -> None:
        """Note a request's first tokens."""
        self.counts.num_waiting -= 1
        self.counts.num_running += 1
        self.counts.prefill_tokens += receipt.computed
        self.counts.loaded_blocks += receipt.host // self._tokens_per_block

    def came(self, num_tokens: int, num_accepted: int) -> None:
        """Note tokens that came out."""
        self.counts.num_outputs += 1
        self.counts.generated_tokens += num_tokens
        self.counts.accepted_draft_tokens += num_accepted

    def snapshot(self, moves_loaded: bool) -> EngineStats:
        """The figures now; `moves_loaded`: a connector's blocks count as reused, not as missed."""
        counts = self.counts
        return EngineStats(
            kv_cache=self._kv_cache(counts.loaded_blocks if moves_loaded else 0),
            num_waiting=counts.num_waiting,
            num_running=counts.num_running,
            prefill_tokens=counts.prefill_tokens,
            generated_tokens=counts.generated_tokens,
            accepted_draft_tokens=counts.accepted_draft_tokens,
            proposed_draft_tokens=max(self._proposed, counts.accepted_draft_tokens),
            num_turns=self._turns + counts.num_outputs - self._outputs_before,
        )

    def _take(self, entry: Mapping[str, Any]) -> None:
        kv = entry.get("kvCacheStats")
        turns = int(entry["iter"]) + 1 if "iter" in entry else self._turns + 1
        drafts = entry.get("specDecodingStats") or {}
        proposed = int(drafts.get("numDraftTokens") or 0)
        if kv is not None:
            self._kv = {**self._kv, **{name: int(kv[name]) for name in _KV_FIELDS if name in kv}}
        self._proposed += proposed
        if turns > self._turns:  # outputs since then count as turns until the next entry
            self._turns, self._outputs_before = turns, self.counts.num_outputs

    def _kv_cache(self, loaded_blocks: int) -> KvCacheStats:
        kv = self._kv
        missed = kv.get("missedBlocks", 0)
        moved = min(loaded_blocks, missed)
        return KvCacheStats(
            max_num_blocks=kv.get("maxNumBlocks", 0),
            free_num_blocks=kv.get("freeNumBlocks", 0),
            used_num_blocks=kv.get("usedNumBlocks", 0),
            tokens_per_block=kv.get("tokensPerBlock", self._tokens_per_block),
            alloc_total_blocks=kv.get("allocTotalBlocks", 0),
            alloc_new_blocks=kv.get("allocNewBlocks", 0),
            reused_blocks=kv.get("reusedBlocks", 0) + moved,
            missed_blocks=missed - moved,
        )


_KV_FIELDS = (
    "maxNumBlocks",
    "freeNumBlocks",
    "usedNumBlocks",
    "tokensPerBlock",
    "allocTotalBlocks",
    "allocNewBlocks",
    "reusedBlocks",
    "missedBlocks",
)
