"""A connector pair that writes down every call, and keeps blocks in a dictionary.

It trusts nothing that it is not told: tokens, slots and positions come from the reports alone.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from actors.engines.torch.pool import PagedPool
from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes

Plan = tuple[list[tuple[BlockHash, int]], list[tuple[BlockHash, int]]]


@dataclass
class Told:
    """What the reports said of one request."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    valid: int = 0


class RecordingConnector:
    """Both sides in one object. `calls` are (name, facts); `blocks` is what was saved."""

    def __init__(self, pool: PagedPool, blocks: dict[BlockHash, torch.Tensor]) -> None:
        self.pool = pool.tensor
        self.tokens_per_block = pool.layout.tokens_per_block
        self.blocks = blocks
        self.calls: list[tuple[str, Any]] = []
        self.told: dict[int, Told] = {}
        self.promised: dict[int, tuple[int, int]] = {}
        self.loads_of: dict[int, list[tuple[BlockHash, int]]] = {}
        self.plan: Plan = ([], [])
        self.holds = False
        self.to_let_go: list[int] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def reports(self) -> list[tuple[str, RequestData]]:
        outputs = [facts for name, facts in self.calls if name == "build_connector_meta"]
        return [
            (kind, report)
            for output in outputs
            for kind, reports in (("new", output.new_requests), ("old", output.cached_requests))
            for report in reports
        ]

    def reported(self) -> list[tuple[str, list[int], int, int, int]]:
        """Each report: its kind, new tokens, number of new blocks, position, tokens scheduled."""
        return [
            (kind, r.new_tokens, len(r.new_block_ids), r.computed_position, r.num_scheduled_tokens)
            for kind, r in self.reports()
        ]

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        prompt = request.get_tokens(0)
        hashes = block_hashes(prompt, self.tokens_per_block, ReuseScope(request.cache_salt))
        most = (len(prompt) - 1) // self.tokens_per_block
        start = num_computed // self.tokens_per_block
        end = start
        while end < most and hashes[end] in self.blocks:
            end += 1
        self.promised[request.request_id] = (start, end)
        matched = (end - start) * self.tokens_per_block
        self.calls.append(("get_num_new_matched_tokens", (num_computed, matched)))
        return matched, False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self.calls.append(("update_state_after_alloc", list(block_ids)))
        start, end = self.promised[request.request_id]
        hashes = block_hashes(
            request.get_tokens(0), self.tokens_per_block, ReuseScope(request.cache_salt)
        )
        pairs = list(zip(hashes, block_ids, strict=False))
        self.loads_of[request.request_id] = pairs[start:end]

    def build_connector_meta(self, output: SchedulerOutput) -> Plan:
        self.calls.append(("build_connector_meta", output))
        loads, saves = [], []
        for report in output.new_requests:
            assert report.request_id not in self.told, "reported as new twice"
            self.told[report.request_id] = Told()
            loads += self.loads_of.pop(report.request_id)
            matched = self.promised[report.request_id][1] * self.tokens_per_block
            saves += self._note(report, matched + report.num_scheduled_tokens)
        for report in output.cached_requests:
            told = self.told[report.request_id]
            assert report.computed_position == told.valid or report.num_scheduled_tokens == 1
            saves += self._note(report, report.computed_position + report.num_scheduled_tokens)
        return loads, saves

    def _note(self, report: RequestData, valid: int) -> list[tuple[BlockHash, int]]:
        told = self.told[report.request_id]
        told.tokens += report.new_tokens
        told.slots += report.new_block_ids
        assert valid <= len(told.tokens), "tokens that were never reported are called valid"
        before, told.valid = told.valid, valid
        hashes = block_hashes(told.tokens, self.tokens_per_block)
        full = range(before // self.tokens_per_block, valid // self.tokens_per_block)
        return [(hashes[i], told.slots[i]) for i in full]

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        self.calls.append(("request_finished", list(cache_block_ids)))
        return self.holds

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        self.calls.append(("register_kv_caches", kv_cache_tensor.shape))

    def bind_connector_meta(self, metadata: Any) -> None:
        self.calls.append(("bind_connector_meta", None))
        self.plan = metadata

    def start_load_kv(self, stream: Any) -> None:
        self.calls.append(("start_load_kv", stream))
        for block_hash, slot in self.plan[0]:
            self.pool[slot] = self.blocks[block_hash]

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self.calls.append(("wait_for_layer_load", layer_idx))

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self.calls.append(("save_kv_layer", layer_idx))

    def wait_for_save(self, stream: Any) -> None:
        self.calls.append(("wait_for_save", stream))
        for block_hash, slot in self.plan[1]:
            self.blocks.setdefault(block_hash, self.pool[slot].clone())

    def get_finished(self, saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        self.calls.append(("get_finished", (list(saving), list(loading))))
        done, self.to_let_go = self.to_let_go, []
        return done, []
