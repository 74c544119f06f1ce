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

from shared_cache.hashing import HASH_BYTES, BlockHash, BlockHashChain
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


@dataclass(frozen=True, slots=True)
class SaveRun:
    """Consecutive blocks of one request to copy out of the engine's pool, packed for the wire."""

    parent: BlockHash
    packed_hashes: bytes
    packed_blocks: bytes

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The blocks' hashes, first block first."""
        packed = self.packed_hashes
        return tuple(
            BlockHash(packed[start : start + HASH_BYTES])
            for start in range(0, len(packed), HASH_BYTES)
        )

    @property
    def device_blocks(self) -> Sequence[int]:
        """The pool's block ids, in the order of `hashes`."""
        return _unpack(self.packed_blocks)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What the workers are to copy in one turn. Picklable and small: it is broadcast every turn."""

    packed_loads: bytes = b""
    saves: tuple[SaveRun, ...] = ()

    @property
    def loads(self) -> Sequence[tuple[int, int]]:
        """Pairs (host slot, device block) to copy before the forward pass."""
        numbers = _unpack(self.packed_loads)
        return list(zip(numbers[::2], numbers[1::2], strict=True))


@dataclass(slots=True)
class _Request:
    """One request: what the device had, what we promised beyond it, and how far it is saved.

    `lease` covers the promised blocks, first slot first, until the turn that loads them. Blocks
    before `next_save` are saved, or need not be.
    """

    chain: BlockHashChain
    num_device_tokens: int
    num_promised_tokens: int
    lease: HostLease | None
    next_save: int
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

    def __len__(self) -> int:
        return len(self._requests)

    def matched(
        self, request_id: int, chain: BlockHashChain, num_device_tokens: int, lease: HostLease
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
        first_computed = (num_device_tokens + promised) // size
        self._requests[request_id] = _Request(
            chain=chain,
            num_device_tokens=num_device_tokens,
            num_promised_tokens=promised,
            lease=lease if promised else None,
            next_save=max(first_computed, host_end),
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

    def take_saves(
        self, new_requests: Sequence[ReportedRequest], cached_requests: Sequence[ReportedRequest]
    ) -> tuple[SaveRun, ...]:
        """The blocks that this turn's forward pass completes; call it once, after `begin_turn`."""
        runs = []
        for is_new, reports in ((True, new_requests), (False, cached_requests)):
            for report in reports:
                run = self._take_save(report, is_new)
                runs += [run] if run else []
        return tuple(runs)

    def forget(self, request_id: int) -> None:
        """The request is over, or none of ours; unknown ids are ignored.

        The lease of a load of an earlier turn ends now: the engine has seen that turn's result.
        """
        request = self._requests.pop(request_id, None)
        if request is not None and request.lease is not None:
            self._released.append(request.lease)
        self._end_loads(request_id)

    def take_released(self) -> list[HostLease]:
        """The leases to release, each given out once."""
        released, self._released = self._released, []
        return released

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

    def _take_save(self, report: ReportedRequest, is_new: bool) -> SaveRun | None:
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
        return self._save(request, self._num_valid_tokens(request, report, is_new))

    def _num_valid_tokens(self, request: _Request, report: ReportedRequest, is_new: bool) -> int:
        """Tokens whose KV is valid after this turn's forward pass.

        The first report's `computed_position` leaves out what we load, so our own figures count.
        """
        valid_before = report.computed_position
        if is_new:
            valid_before = request.num_device_tokens + request.num_promised_tokens
        return valid_before + report.num_scheduled_tokens

    def _save(self, request: _Request, num_valid_tokens: int) -> SaveRun | None:
        start, hashes = request.next_save, request.chain.hashes
        num_valid_blocks = num_valid_tokens // self._tokens_per_block
        stop = min(num_valid_blocks, len(hashes), len(request.block_ids))
        if stop <= start:
            return None
        request.next_save = stop
        return SaveRun(
            parent=request.chain.parent_of(start),
            packed_hashes=b"".join(hashes[start:stop]),
            packed_blocks=array("I", request.block_ids[start:stop]).tobytes(),
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


def _unpack(packed: bytes) -> Sequence[int]:
    numbers = array("I")
    numbers.frombytes(packed)
    return numbers
