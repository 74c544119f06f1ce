"""The connector's decisions: what to load, what to save, and when a lease may end.

Events of the engine go in (matched, one turn, finished), a `TransferPlan` comes out. It touches no
bytes and no engine, so every order of events can be tested. What it prevents, each seen in a
respected connector: saving blocks of a chunked prompt before they are computed; promising the
whole prompt, which leaves the engine no token to compute; keeping state of aborted requests.
"""

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared_cache.connector.transfers import SaveRun
from shared_cache.hashing import BlockHashChain
from shared_cache.host.interface import HostLease

TURNS_UNTIL_COPIED = 2
"""A load's lease ends this many turns later. An engine has at most one forward pass in flight
besides the one it prepares, so by then the pass that waited for the copy has been sampled."""

EXPIRE_TURNS = 64
EXPIRE_S = 60.0
"""State of a request that was not reported for this many turns AND this long is dropped: engines
do not say `request_finished` for every aborted request."""


class ReportedRequest(Protocol):
    """What the engine tells of one request in one turn (`RequestData`)."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@dataclass(slots=True)
class _Request:
    """One request: what the device had, what we promised beyond it, and how far it is saved.

    `lease` covers the promised blocks, first slot first, until the turn that loads them. Blocks
    before `next_save` are saved, or need not be; those from there to `num_savable` wait for it,
    and those before `num_proven` are of turns that went well.
    """

    chain: BlockHashChain
    tenant: bytes
    num_prompt_tokens: int
    num_device_tokens: int
    num_promised_tokens: int
    lease: HostLease | None
    next_save: int
    num_savable: int
    num_proven: int
    seen_turn: int
    seen_s: float
    is_reported: bool = False
    block_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _LoadLease:
    request_id: int
    turn: int
    lease: HostLease


class RequestLedger:
    """The requests of one engine, as far as the connector has to know them. Not thread-safe.

    Requests it was never asked about (dummies, warm-up, multimodal) are ignored in every event.
    Leases that it no longer needs are collected by `take_released`.
    """

    def __init__(self, tokens_per_block: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens_per_block = tokens_per_block
        self._clock = clock
        self._turn = 0
        self._requests: dict[int, _Request] = {}
        self._load_leases: list[_LoadLease] = []
        self._released: list[HostLease] = []
        self._early_saves: list[SaveRun] = []
        self._num_lost = 0

    def __len__(self) -> int:
        return len(self._requests)

    def matched(
        self,
        request_id: int,
        chain: BlockHashChain,
        num_device_tokens: int,
        lease: HostLease,
        tenant: bytes = b"",
    ) -> int:
        """How many tokens to promise, given what the device has and `lease` holds in host memory.

        Whole blocks, and at least one prompt token is left to compute. Takes over `lease`, which
        covers a run of `chain` that begins at block `num_device_tokens // tokens_per_block`: what
        host memory holds of the blocks before does not matter. A request of the same id is
        forgotten.
        """
        self.forget(request_id)
        size = self._tokens_per_block
        host_end = num_device_tokens // size + len(lease.slots)
        promised = 0
        if num_device_tokens % size == 0:
            most = min(host_end, (chain.num_tokens - 1) // size) * size
            promised = max(0, most - num_device_tokens)
        if not promised:
            self._released.append(lease)
        # An unaligned device match leaves a block whose head was reused and whose tail is computed
        # now. It is valid as a whole after this pass and saved: a hole would orphan what follows.
        next_save = max((num_device_tokens + promised) // size, host_end)
        self._requests[request_id] = _Request(
            chain=chain,
            tenant=tenant,
            num_prompt_tokens=chain.num_tokens,
            num_device_tokens=num_device_tokens,
            num_promised_tokens=promised,
            lease=lease if promised else None,
            next_save=next_save,
            num_savable=next_save,
            num_proven=next_save,
            seen_turn=self._turn,
            seen_s=self._clock(),
        )
        return promised

    def begin_turn(self, new_requests: Sequence[ReportedRequest]) -> bytes:
        """This turn's loads, packed as `TransferPlan.packed_loads`; call it first in every turn.

        Raises `ValueError` when the engine allocated too few blocks for what it was promised.
        """
        self._turn += 1
        self._end_loads()
        if self._turn % EXPIRE_TURNS == 0:
            self._expire()
        pairs = array("I")
        for report in new_requests:
            request = self._requests.get(report.request_id)
            if request is not None and request.lease is not None:
                for pair in self._load(report, request, request.lease):
                    pairs.extend(pair)
        return pairs.tobytes()

    def is_decoding(self, cached_requests: Sequence[ReportedRequest]) -> bool:
        """Whether this turn computes any request's tokens behind its prompt."""
        return any(
            request is not None and report.computed_position >= request.num_prompt_tokens
            for report in cached_requests
            for request in (self._requests.get(report.request_id),)
        )

    def take_saves(
        self,
        new_requests: Sequence[ReportedRequest],
        cached_requests: Sequence[ReportedRequest],
        max_blocks: int | None = None,
    ) -> tuple[SaveRun, ...]:
        """The blocks that this turn's forward pass completes; call it once, after `begin_turn`.

        Blocks beyond `max_blocks` wait for a later turn of their request.
        """
        runs = []
        for is_new, reports in ((True, new_requests), (False, cached_requests)):
            for report in reports:
                run = self._take_save(report, is_new, max_blocks)
                if run is not None:
                    runs.append(run)
                    if max_blocks is not None:
                        max_blocks -= len(run.device_blocks)
        return tuple(runs)

    def finish(self, request_id: int) -> None:
        """The request has ended, and its blocks are free; see `take_early_saves`, and `forget`.

        Only blocks of turns before its last one are sure to be computed: it may have ended because
        that one failed.
        """
        request = self._requests.get(request_id)
        if request is not None:
            run = self._save(request, request.num_proven)
            self._early_saves += [run] if run else []
        self.forget(request_id)

    def take_early_saves(self) -> tuple[SaveRun, ...]:
        """Blocks of ended requests, to be copied before anything writes to them; each given once.

        To be asked in the turn after they ended: before it nothing has.
        """
        runs, self._early_saves = tuple(self._early_saves), []
        return runs

    def forget(self, request_id: int) -> None:
        """The request is none of ours any more; unknown ids are ignored.

        The lease of a load of an earlier turn ends now: the engine has seen that turn's result.
        """
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._num_lost += request.num_savable - request.next_save
            if request.lease is not None:
                self._released.append(request.lease)
        self._end_loads(request_id)

    def take_released(self) -> list[HostLease]:
        """The leases to release, each given out once."""
        released, self._released = self._released, []
        return released

    def take_lost(self) -> int:
        """How many blocks were never saved because their request ended first, each told once."""
        num_lost, self._num_lost = self._num_lost, 0
        return num_lost

    def _load(
        self, report: ReportedRequest, request: _Request, lease: HostLease
    ) -> Iterator[tuple[int, int]]:
        size, num_device_tokens = self._tokens_per_block, request.num_device_tokens
        num_loaded_tokens = num_device_tokens + request.num_promised_tokens
        blocks = range(num_device_tokens // size, num_loaded_tokens // size)
        if len(report.new_block_ids) < blocks.stop:
            raise ValueError(
                f"request {report.request_id}: {blocks.stop} blocks of prefix are promised, the "
                f"engine allocated {len(report.new_block_ids)}"
            )
        self._load_leases.append(_LoadLease(report.request_id, self._turn, lease))
        request.lease = None
        device_blocks = report.new_block_ids[blocks.start : blocks.stop]
        return zip(lease.slots, device_blocks, strict=False)  # the lease may hold one block more

    def _take_save(
        self, report: ReportedRequest, is_new: bool, max_blocks: int | None
    ) -> SaveRun | None:
        request = self._requests.get(report.request_id)
        if request is None:
            return None
        if request.is_reported == is_new:  # replayed or joined midway: its tokens are in doubt
            self.forget(report.request_id)
            return None
        request.seen_turn, request.seen_s = self._turn, self._clock()
        request.is_reported = True
        request.block_ids += report.new_block_ids
        num_known_tokens = request.chain.num_tokens if is_new else 0
        request.chain.extend(report.new_tokens[num_known_tokens:])
        num_valid_blocks = self._num_valid_tokens(request, report, is_new) // self._tokens_per_block
        num_savable = min(num_valid_blocks, len(request.chain.hashes), len(request.block_ids))
        request.num_proven = request.num_savable
        request.num_savable = max(request.num_savable, num_savable)
        stop = request.num_savable
        if max_blocks is not None:
            stop = min(stop, request.next_save + max_blocks)
        return self._save(request, stop)

    def _num_valid_tokens(self, request: _Request, report: ReportedRequest, is_new: bool) -> int:
        """Tokens whose KV is valid after this turn's forward pass.

        The first report's `computed_position` leaves out what we load, so our own figures count.
        """
        valid_before = report.computed_position
        if is_new:
            valid_before = request.num_device_tokens + request.num_promised_tokens
        return valid_before + report.num_scheduled_tokens

    def _save(self, request: _Request, stop: int) -> SaveRun | None:
        start = request.next_save
        if stop <= start:
            return None
        request.next_save = stop
        return SaveRun(
            parent=request.chain.parent_of(start),
            packed_hashes=b"".join(request.chain.hashes[start:stop]),
            packed_blocks=array("I", request.block_ids[start:stop]).tobytes(),
            tenant=request.tenant,
            first=start,
        )

    def _end_loads(self, request_id: int | None = None) -> None:
        """Release loads that are copied for sure, those of `request_id` a turn sooner."""
        kept = []
        for load in self._load_leases:
            age = self._turn - load.turn
            if age >= TURNS_UNTIL_COPIED or (age >= 1 and load.request_id == request_id):
                self._released.append(load.lease)
            else:
                kept.append(load)
        self._load_leases = kept

    def _expire(self) -> None:
        before_turn, before_s = self._turn - EXPIRE_TURNS, self._clock() - EXPIRE_S
        for request_id, request in list(self._requests.items()):
            if request.seen_turn <= before_turn and request.seen_s <= before_s:
                self.forget(request_id)
