"""The smallest engine that speaks the connector protocol in TensorRT-LLM's order of calls.

"KV" of a token is a digest of all tokens up to it, and so is the next token. Before every forward
pass it checks that the KV it is about to attend to is that of its own prefix: a block that was
loaded wrongly, late, or from another prefix fails the test at once.
"""

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.sharded import ShardedCache
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import LAYOUT, await_published

SIZE = LAYOUT.tokens_per_block
TOKEN_BYTES = LAYOUT.block_bytes // SIZE


def token_kv(prefix: list[int], rank: int = 0) -> bytes:
    of_rank = rank.to_bytes(2, "little")
    return hashlib.blake2b(repr(prefix).encode(), digest_size=TOKEN_BYTES, salt=of_rank).digest()


def block_kv(tokens: list[int], block: int, rank: int = 0) -> bytes:
    positions = range(block * SIZE, (block + 1) * SIZE)
    return b"".join(token_kv(tokens[: position + 1], rank) for position in positions)


@dataclass
class MiniRequest:
    """Stands for `LlmRequest`."""

    request_id: int
    tokens: list[int]
    cache_salt: str | None = None
    lora_task_id: int | None = None
    multimodal_hashes: list[int] | None = None
    blocks: list[int] = field(default_factory=list)
    num_valid: int = 0
    num_reported_tokens: int = 0
    num_reported_blocks: int = 0
    num_loaded_tokens: int = 0

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self.tokens)


class MiniEngine:
    """One pool on a CPU for each rank, without device reuse; requests run one by one or mixed.

    `cache` is what is matched in; `shards` are the ranks' own caches, by default those of `cache`.
    """

    def __init__(
        self,
        cache: SharedCache | ShardedCache,
        num_blocks: int = 64,
        chunk: int = 1000,
        shards: Sequence[SharedCache] = (),
    ) -> None:
        self.cache = cache
        self.chunk = chunk
        self.shards = shards or (cache.shards if isinstance(cache, ShardedCache) else (cache,))
        self.ranks = range(len(self.shards))
        shape = (num_blocks, *LAYOUT.shape)
        self.pools = [torch.zeros(shape, dtype=torch.float32) for _ in self.ranks]
        self.rows = [pool.view(num_blocks, -1).view(torch.uint8).numpy() for pool in self.pools]
        self.free = list(range(num_blocks))
        self.stale: list[int] = []
        self.scheduler = SharedCacheScheduler(cache, SIZE)
        self.workers = [SharedCacheWorker(shard, rank) for rank, shard in enumerate(self.shards)]
        for worker, pool in zip(self.workers, self.pools, strict=True):
            worker.register_kv_caches(pool)
        self.worker = self.workers[0]

    def start(self, request: MiniRequest, device_tokens: int = 0) -> None:
        """Match and allocate; `device_tokens` are as if found on the device."""
        num_matched, is_async = self.scheduler.get_num_new_matched_tokens(request, device_tokens)
        assert not is_async
        assert num_matched % SIZE == 0
        assert device_tokens + num_matched < len(request.tokens) or not num_matched
        self._allocate(request)
        for position in range(device_tokens):
            self._write(request, position)
        request.num_loaded_tokens = num_matched
        request.num_valid = device_tokens + num_matched
        self.scheduler.update_state_after_alloc(request, list(request.blocks))

    def turn(self, *requests: MiniRequest, new: tuple[MiniRequest, ...] = ()) -> None:
        """One forward pass over `requests`; those in `new` are reported for the first time."""
        output, scheduled = SchedulerOutput(), []
        for request in (*new, *requests):
            self._allocate(request)
            num_scheduled = min(self.chunk, len(request.tokens) - request.num_valid)
            scheduled.append((request, num_scheduled))
            is_new = any(request is other for other in new)
            reports = output.new_requests if is_new else output.cached_requests
            reports.append(self._report(request, num_scheduled, is_new))
        wire = pickle.dumps(self.scheduler.build_connector_meta(output))
        for worker in self.workers:
            worker.bind_connector_meta(pickle.loads(wire))
            worker.start_load_kv(None)
        for block in self.stale:
            if block in self.free:
                for rank in self.ranks:
                    self.rows[rank][block] = 0xEE
        self.stale.clear()
        for request, num_scheduled in scheduled:
            self._forward(request, num_scheduled)
        for worker in self.workers:
            worker.wait_for_save(None)
            assert worker.get_finished([], []) == ([], [])

    def finish(self, request: MiniRequest) -> None:
        """Free the blocks; what was saved is in the host tier afterwards."""
        assert self.scheduler.request_finished(request, list(request.blocks)) is False
        self.abort(request)
        for shard in self.shards:
            await_published(shard)

    def abort(self, request: MiniRequest) -> None:
        """The engine forgets the request without a word to the connector.

        Its blocks are scribbled over where their next owner may write: in the next forward pass.
        """
        self.stale += request.blocks
        self.free += request.blocks
        request.blocks = []

    def run(self, request: MiniRequest, num_new_tokens: int = 1, device_tokens: int = 0) -> int:
        """Serve one request to its end; tokens that were loaded instead of computed."""
        num_prompt_tokens = len(request.tokens)
        self.start(request, device_tokens)
        self.turn(new=(request,))
        while len(request.tokens) < num_prompt_tokens + num_new_tokens:
            self.turn(request)
        self.finish(request)
        return request.num_loaded_tokens

    def _allocate(self, request: MiniRequest) -> None:
        while len(request.blocks) * SIZE < len(request.tokens):
            request.blocks.append(self.free.pop())

    def _report(self, request: MiniRequest, num_scheduled: int, is_new: bool) -> RequestData:
        position = request.num_valid - (request.num_loaded_tokens if is_new else 0)
        report = RequestData(
            request.request_id,
            request.tokens[request.num_reported_tokens :],
            request.blocks[request.num_reported_blocks :],
            position,
            num_scheduled,
        )
        request.num_reported_tokens = len(request.tokens)
        request.num_reported_blocks = len(request.blocks)
        return report

    def _forward(self, request: MiniRequest, num_scheduled: int) -> None:
        for position in range(request.num_valid):
            for rank in self.ranks:
                kv = bytes(self._place(request, position, rank))
                right = token_kv(request.tokens[: position + 1], rank)
                assert kv == right, f"wrong KV at {position} on rank {rank}"
        for position in range(request.num_valid, request.num_valid + num_scheduled):
            self._write(request, position)
        request.num_valid += num_scheduled
        if request.num_valid == len(request.tokens):
            request.tokens.append(int.from_bytes(token_kv(request.tokens)[:4], "little") % 50_000)

    def _write(self, request: MiniRequest, position: int) -> None:
        for rank in self.ranks:
            kv = token_kv(request.tokens[: position + 1], rank)
            self._place(request, position, rank)[:] = memoryview(kv)

    def _place(self, request: MiniRequest, position: int, rank: int):  # type: ignore[no-untyped-def]
        row = self.rows[rank][request.blocks[position // SIZE]]
        start = position % SIZE * TOKEN_BYTES
        return row[start : start + TOKEN_BYTES]
