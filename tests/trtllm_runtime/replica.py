"""One replica of the double: the classes under test between their caches and an executor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

from shared_cache.config import CacheConfig
from shared_cache.connector import worker as worker_module
from shared_cache.connector.interface import SchedulerOutput
from shared_cache.connector.scheduler import MatchRule, SharedCacheScheduler
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.eviction import make_policy
from shared_cache.host.interface import HostTier
from shared_cache.host.local import LocalHostTier
from shared_cache.host.terms import IndexRules
from shared_cache.pacing import TurnBudget
from shared_cache.prefix_cache import PrefixCache, StagedPrefix
from shared_cache.sharded import ShardedCache
from shared_cache.staging import SharedCache
from tests.shared_cache.arenas import await_true
from tests.shared_cache.fakes import WAIT_S, await_published
from tests.trtllm_runtime.executor import Executor
from tests.trtllm_runtime.oracle import LAYOUT
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import Rules
from tests.trtllm_runtime.site import Site
from tests.trtllm_runtime.stream import LaggingCopier

SIZE = LAYOUT.tokens_per_block
SLOT_BYTES = 4096
STAGED_HERE = MatchRule(staged_ahead=True, wait_s=0.0)
"""A replica staged before; matching asks nobody."""

STAGES_IN_MATCH = MatchRule(staged_ahead=False, wait_s=WAIT_S)
"""No replica: the match call stages, and waits as long as it takes."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a replica of the double is put together.

    `saves_per_turn` is all that may be copied off the device while requests decode: the rest waits,
    and that of ended requests is saved early in a later turn. None: no limit. `is_squeezed`: as
    soon as a turn is planned, others write to all host memory that nobody leases.
    """

    rules: Rules = field(default_factory=Rules)
    match: MatchRule = STAGES_IN_MATCH
    num_slots: int = 64
    deadline_s: float = WAIT_S
    saves_per_turn: int | None = None
    is_squeezed: bool = False


class FixedBudget(TurnBudget):
    """So many blocks in each turn in which any request decodes, however fast this machine is."""

    def __init__(self, saves_per_turn: int) -> None:
        super().__init__(1.0)
        self._saves_per_turn = saves_per_turn

    def begin_turn(self, is_decoding: bool) -> int | None:
        return self._saves_per_turn if is_decoding else None


def local_hosts(tp_size: int, num_slots: int) -> list[HostTier]:
    """Host tiers of this process, one per rank."""
    rules = IndexRules(lambda clock: make_policy("lru", clock), {}, "always")
    return [
        LocalHostTier(num_slots * SLOT_BYTES, LAYOUT.block_bytes, rules) for _ in range(tp_size)
    ]


def make_caches(site: Site, setup: Setup, hosts: Sequence[HostTier]) -> list[SharedCache]:
    """One cache per rank, over the site's stores."""
    config = CacheConfig.model_validate(
        {
            "staging_deadline_s": setup.deadline_s,
            "io_threads": 1,
            "cost": {"gate": False},
            "tiers": [{"url": "memory://0"}],
        }
    )
    stores = site.stores()
    return [
        SharedCache(host, [store], config, site.clock)
        for host, store in zip(hosts, stores, strict=True)
    ]


class Replica:
    """An executor with our connector; `cache` is what stages and matches, `caches` its shards."""

    def __init__(
        self,
        site: Site,
        setup: Setup | None = None,
        caches: Sequence[SharedCache] | None = None,
        other_ranks: Sequence[Any] = (),
    ) -> None:
        """`caches` are one per rank; by default they have host tiers of their own.

        `other_ranks` stand for the ranks behind rank 0, where these run elsewhere.
        """
        self.site = site
        self.setup = setup = setup or Setup()
        tp_size = len(site.media)
        self.caches = list(
            caches or make_caches(site, setup, local_hosts(tp_size, setup.num_slots))
        )
        if setup.saves_per_turn is not None:
            for cache in self.caches:
                cache.turn_budget = FixedBudget(setup.saves_per_turn)
        self.cache: PrefixCache = ShardedCache(self.caches) if tp_size > 1 else self.caches[0]
        self.requests: list[Request] = []
        self._staged: dict[int, StagedPrefix] = {}
        # As upstream does it: rank 0's two halves are made at the same time in fresh threads.
        with ThreadPoolExecutor(2) as pool:
            scheduler = pool.submit(SharedCacheScheduler, self.cache, SIZE, setup.match)
            worker = pool.submit(SharedCacheWorker, self.caches[0], 0)
            self.scheduler = scheduler.result()
            first = worker.result()
        if setup.is_squeezed:
            self._squeeze_in_every_turn()
        others = list(other_ranks) or [
            SharedCacheWorker(cache, rank) for rank, cache in enumerate(self.caches) if rank
        ]
        self.workers = [first, *others]
        with ExitStack() as stack:
            if setup.rules.lags:
                stack.enter_context(mock.patch.object(worker_module, "make_copier", LaggingCopier))
            self.executor = Executor(self.scheduler, self.workers, setup.rules)

    def submit(self, request: Request) -> Request:
        """Give a request to the executor, as a user of plain TensorRT-LLM does."""
        self.executor.submit(request)
        self.requests.append(request)
        return request

    def submit_staged(self, request: Request, deadline_s: float | None = None) -> Request:
        """Stage first, as our replica does; the lease ends with the request."""
        hashes = self.site.hashes_of(request, request.prompt)
        scope = self.site.scope_of(request)
        staged = self.cache.lease(hashes, scope=scope)
        staged = self.cache.grow(staged, hashes, deadline_s)
        try:
            self.submit(request)
        except ValueError:
            self.cache.release(staged)
            raise
        self._staged[request.request_id] = staged
        return request

    def step(self) -> bool:
        """One turn; False when the loop sleeps. Promises are whole blocks, behind whole blocks."""
        is_awake = self.executor.step()
        for request in self.executor.active:
            assert request.num_promised_tokens % SIZE == 0
            assert not (request.num_promised_tokens and request.num_device_tokens % SIZE)
        for request in self.executor.done:
            staged = self._staged.pop(request.request_id, None)
            if staged is not None:
                self.cache.release(staged)
        self.site.learn(self.executor.done)
        self.executor.done.clear()
        return is_awake

    def run(self, *requests: Request) -> None:
        """Submit these, and go on until all requests have ended."""
        for request in requests:
            self.submit(request)
        while self.step():
            pass

    def settle(self) -> None:
        """Run to the end; what is to be saved is in the host tier afterwards."""
        self.run()
        for stream in self.executor.streams:
            stream.drain()
        self.site.learn(self.requests)
        for cache in self.caches:
            await_published(cache)

    def num_in_host(self, request: Request, tokens: Sequence[int] | None = None) -> int:
        """Leading blocks of a request that every rank's host tier holds, their bytes checked."""
        self.site.learn([request])
        hashes = self.site.hashes_of(request, tokens)
        counts = []
        for rank, cache in enumerate(self.caches):
            lease = cache.host.lease(hashes)
            for name, slot in zip(hashes, lease.slots, strict=False):
                assert bytes(cache.host.buffer(slot)) == self.site.truth(name, rank)
            cache.host.release(lease)
            counts.append(len(lease.slots))
        return min(counts)

    def squeeze_host(self) -> None:
        """Something else needs all of the host tier for a moment, and writes all over it."""
        for cache in self.caches:
            slots = cache.host.reserve(cache.host.num_slots)
            for slot in slots:
                cache.host.buffer(slot)[:] = b"\xaa" * cache.host.block_bytes
            cache.host.cancel(slots)

    def _squeeze_in_every_turn(self) -> None:
        """What leases do not protect is gone before the device gets to this turn's loads."""
        build = self.scheduler.build_connector_meta

        def build_and_squeeze(output: SchedulerOutput) -> object:
            plan = build(output)
            self.squeeze_host()
            return plan

        self.scheduler.build_connector_meta = build_and_squeeze  # type: ignore[assignment]

    @property
    def num_faults(self) -> int:
        """Errors that connector halves kept from the executor."""
        return self.scheduler.connector_faults + sum(one.connector_faults for one in self.workers)

    def check_books(self) -> None:
        """What must hold between any two turns."""
        self.executor.check()
        assert self.num_faults == 0, "an error was kept from the executor"

    def check_quiet(self) -> None:
        """Nothing is leased, reserved, tracked or pinned once all work is done."""
        self.settle()
        for _ in range(3):  # a load's lease ends some turns later
            self.run(Request(10_000_000 + len(self.requests), (1,)))
        self.settle()
        self.check_books()
        assert self.executor.blocks.num_free == self.setup.rules.num_blocks
        assert self.executor.manager.num_pending == 0
        for cache in self.caches:
            cache.flush(WAIT_S)
            await_true(partial(self._is_idle, cache))  # what comes late ends by itself

    def _is_idle(self, cache: SharedCache) -> bool:
        """Whether nothing is leased or reserved. Time goes on: what a bad store put off is due."""
        self.site.clock.now_s += 1.0
        host = cache.stats().host
        return (host.leased_slots, host.reserved_slots) == (0, 0)

    def close(self) -> None:
        """As an engine that is shut down, or whose loop has ended."""
        self.site.learn(self.requests)
        for stream in self.executor.streams:
            stream.discard() if self.executor.is_dead else stream.drain()
        for staged in self._staged.values():
            self.cache.release(staged)
        for worker in self.workers:
            worker.close()
        self.cache.close()
