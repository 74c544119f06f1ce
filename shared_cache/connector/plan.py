"""The connector's decisions: what to load, what to save, and when a lease may end.

Events of the engine go in (matched, one turn, finished), a `TransferPlan` comes out. It touches no
bytes and no engine, so every order of events can be tested. What it prevents, each seen in a
respected connector: saving blocks of a chunked prompt before they are computed; promising the
whole prompt, which leaves the engine no token to compute; keeping state of aborted requests; saving
what was computed behind blocks that an aborted request left uncomputed on the device.
"""

import time
from collections.abc import Callable, Sequence

from shared_cache.connector.doubts import DoubtfulBlocks
from shared_cache.connector.ended_saves import EndedSaves
from shared_cache.connector.load_leases import LoadLeases
from shared_cache.connector.proofs import Proofs
from shared_cache.connector.requests import (
    PlannedLoad,
    Prompt,
    ReportedRequest,
    TrackedRequest,
)
from shared_cache.connector.save_runs import SaveRun
from shared_cache.staged import StagedPrefix

EXPIRE_TURNS = 64
EXPIRE_S = 60.0
"""State of a request that was not reported for this many turns AND this long is dropped: engines
do not say `request_finished` for every aborted request."""


class RequestLedger:
    """The requests of one engine, as far as the connector has to know them. Not thread-safe.

    Requests it was never asked about (dummies, warm-up, multimodal) are ignored in every event.
    Leases that it no longer needs are collected by `take_released`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, holds: bool = False) -> None:
        """`holds`: an ended request's blocks stay until all is saved; see `finish`."""
        self._ended = EndedSaves(holds=holds)
        self._clock = clock
        self._turn = 0
        self._requests: dict[int, TrackedRequest] = {}
        self._loads = LoadLeases()
        self._released: list[StagedPrefix] = []
        self._broken_promises: set[int] = set()
        self._ahead: list[int] = []
        self._doubts = DoubtfulBlocks()
        self._proofs = Proofs()

    def __len__(self) -> int:
        return len(self._requests)

    def matched(
        self,
        request_id: int,
        prompt: Prompt,
        num_device_tokens: int,
        lease: StagedPrefix,
    ) -> int:
        """How many tokens to promise, given what the device has and `lease` holds in host memory.

        Whole blocks, and at least one prompt token is left to compute. Takes over `lease`, which
        covers a run of the prompt that begins at block `num_device_tokens // tokens_per_block`:
        what host memory holds of the blocks before does not matter. A request of the same id is
        forgotten. One whose device prefix was left uncomputed by another gets no promise, and
        nothing of it is saved; where that depends on what this turn will report, see `take_save`.
        """
        self.forget(request_id)
        chain = prompt.chain
        if self._doubts.are_in(chain, num_device_tokens):
            self._released.append(lease)
            return 0
        self._doubts.are_gone_behind(chain, num_device_tokens)
        request = TrackedRequest.matched(
            prompt, num_device_tokens, lease, self._turn, self._clock()
        )
        request.rests_on = self._proofs.grounds(self._requests, chain, num_device_tokens)
        if request.lease is None:
            self._released.append(lease)
        self._requests[request_id] = request
        return request.num_promised_tokens

    def allocated(self, request_id: int, block_ids: Sequence[int]) -> None:
        """The device blocks of the whole prompt; the promised ones among them will be loaded to."""
        request = self._requests.get(request_id)
        if request is not None and request.lease is not None:
            request.allocated = tuple(block_ids)

    def never_save(self, request_id: int) -> None:
        """Token ids do not say what this request's blocks hold; what it was promised stays."""
        request = self._requests.get(request_id)
        if request is not None:
            request.is_saved = False

    def begin_turn(
        self,
        new_requests: Sequence[ReportedRequest],
        cached_requests: Sequence[ReportedRequest] = (),
    ) -> list[PlannedLoad]:
        """This turn's loads; call it first in every turn.

        Raises `ValueError` when a promise cannot be kept: it is not known which device blocks it is
        about, the report is not about the prompt that it was made for, or it has expired.
        """
        self._turn += 1
        self._end_loads()
        self._proofs.note_turn(self._requests, new_requests, cached_requests)
        if self._turn % EXPIRE_TURNS == 0:
            self._expire()
        loads = []
        for is_new, reports in ((True, new_requests), (False, cached_requests)):
            for report in reports:
                request = self._requests.get(report.request_id)
                lease = None if request is None else request.lease
                if request is not None and self._loads.is_ahead(report.request_id):
                    request.is_loading = False
                    self._released.append(self._loads.reported(report.request_id))
                if report.request_id in self._broken_promises:
                    raise ValueError(f"request {report.request_id} comes too late for its promise")
                if request is not None and lease is not None:
                    loads.append(request.planned_load(lease, report, is_new=is_new))
                    self._loads.in_turn(report.request_id, self._turn, lease)
        return loads

    def load_ahead(self, request_id: int) -> None:
        """What was just promised to this request is loaded before the engine computes it."""
        self._ahead.append(request_id)

    def take_ahead(self) -> list[tuple[int, PlannedLoad]]:
        """The loads ahead that begin in this turn, by request; call it after `begin_turn`.

        Their leases are held until the request is reported: the engine does that when all ranks
        have said that the load is done. Raises `ValueError` like `begin_turn`.
        """
        ahead, self._ahead = self._ahead, []
        loads = []
        for request_id in ahead:
            request = self._requests.get(request_id)
            lease = None if request is None else request.lease
            if request is not None and lease is not None:
                loads.append((request_id, request.planned_ahead(request_id, lease)))
                self._loads.ahead(request_id, lease)
        return loads

    def is_decoding(self, cached_requests: Sequence[ReportedRequest]) -> bool:
        """Whether this turn computes any request's tokens behind its prompt."""
        return any(
            request is not None and report.computed_position >= request.num_prompt_tokens
            for report in cached_requests
            for request in (self._requests.get(report.request_id),)
        )

    def take_save(
        self, report: ReportedRequest, is_new: bool, max_blocks: int | None = None
    ) -> SaveRun | None:
        """The blocks of one request that this turn's forward pass completes, if any.

        To be asked once a turn for every request that is reported, after `begin_turn`. Blocks
        beyond `max_blocks` wait for a later turn. A request whose report makes no sense is
        forgotten, whether that raises or not. Nothing is saved of one whose device prefix goes into
        the prompt of another that was being computed when it was matched, unless that one is still
        reported: it may be gone, and have left those blocks uncomputed.
        """
        request = self._requests.get(report.request_id)
        if request is None:
            return None
        if request.rests_on:
            request.is_saved = request.is_saved and all(map(self._proofs.is_firm, request.rests_on))
            request.rests_on = ()
        if request.is_reported == is_new:  # replayed or joined midway: its tokens are in doubt
            self.forget(report.request_id)
            return None
        request.seen_turn, request.seen_s = self._turn, self._clock()
        try:
            request.note(report, is_new=is_new)
        except BaseException:
            self.forget(report.request_id)
            raise
        stop = request.num_valid
        if max_blocks is not None:
            stop = min(stop, request.next_save + max_blocks)
        return request.take_save(stop)

    def finish(self, request_id: int, num_tokens: int = 0) -> bool:
        """The request has ended, and its blocks are free; see `take_early_saves`, and `forget`.

        True when they must not be free yet: something is left to save and this ledger `holds`, or
        a load ahead may be under way. `take_leaving` then says when.

        Only blocks of turns before its last one are sure to be computed: it may have ended because
        that one failed. `num_tokens` are all it came to: if they are more than its prompt's, its
        prompt was computed, as without that nothing follows.
        """
        request = self._requests.get(request_id)
        is_loading = self._loads.is_ahead(request_id)
        if request is None:
            self.forget(request_id)
            return is_loading
        is_computed = num_tokens > request.num_prompt_tokens
        num_proven = request.num_proven
        if is_computed:
            num_proven = max(num_proven, request.num_prompt_blocks)
        run = None if is_loading else request.take_save(min(num_proven, request.num_valid))
        is_held = self._ended.leave(request_id, run, self._clock(), is_loading=is_loading)
        self._drop(request_id, is_computed=is_computed)
        return is_held

    def take_early_saves(self, room: int | None = None) -> tuple[SaveRun, ...]:
        """Blocks of ended requests, to be copied before anything writes to them; each given once.

        To be asked in the turn after they ended: before it nothing has. What takes more than `room`
        (see `SaveRun.room`) is lost, as nothing keeps it.
        """
        return self._ended.take_early(room)

    def take_leaving(self, room: int, most: int) -> tuple[list[SaveRun], tuple[int, ...]]:
        """What ended requests whose blocks are held have to save now, and which may go after that.

        See `HeldRuns.take`; what waited for too long is lost.
        """
        return self._ended.take_leaving(room, most, self._clock())

    def lose_early_saves(self) -> None:
        """The engine has written to free blocks: what ended requests have left in them is lost."""
        self._ended.lose_early()

    def forget(self, request_id: int) -> None:
        """The request is none of ours any more; unknown ids are ignored.

        The lease of a load of an earlier turn ends now: the engine has seen that turn's result.
        What was not computed of its prompt is in doubt from now on.
        """
        self._drop(request_id, is_computed=False)

    def take_released(self) -> list[StagedPrefix]:
        """The leases to release, each given out once."""
        released, self._released = self._released, []
        return released

    def take_lost(self) -> int:
        """How many blocks were never saved because their request ended first, each told once."""
        return self._ended.take_lost()

    def _drop(self, request_id: int, *, is_computed: bool) -> None:
        request = self._requests.pop(request_id, None)
        self._broken_promises.discard(request_id)
        if request is not None:
            start = None if is_computed else self._proofs.uncomputed_from(request)
            if start is not None:
                self._doubts.add(request.chain, start)
            self._ended.lose(request.num_unsaved)
            if request.lease is not None:
                self._released.append(request.lease)
        self._loads.dropped(request_id, self._turn, self._clock())
        self._end_loads(request_id)

    def _end_loads(self, request_id: int | None = None) -> None:
        """Release loads that are copied for sure, those of `request_id` a turn sooner."""
        self._released += self._loads.take_over(self._turn, self._clock(), request_id)

    def _expire(self) -> None:
        self._proofs.forget_turns(self._requests)
        before_turn, before_s = self._turn - EXPIRE_TURNS, self._clock() - EXPIRE_S
        for request_id, request in list(self._requests.items()):
            if request.seen_turn <= before_turn and request.seen_s <= before_s:
                self.forget(request_id)
                if request.lease is not None:
                    self._broken_promises.add(request_id)
