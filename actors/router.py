"""The router: live load, prefix knowledge and reservations, decided and booked in one call.

Load that is polled is late, and a burst of requests would then all see the same idle replica. So a
route is booked in the call that chooses it; the caller reports the first token and the end. What a
caller that died never reports expires. What a dead replica held goes with it, and what a receipt
disproves is believed no more.
"""

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from actors.engine import CacheChanges, Receipt
from actors.reservations import Reservation, Reservations
from actors.router_config import RouterConfig as RouterConfig
from actors.routing import PrefixIndex, PromptView, ReplicaView, WorkModel, make_policy
from shared_cache.hashing import BlockHash

SHARED_TIER = "shared tier"


@dataclass(frozen=True, slots=True)
class Route:
    """A choice and its booking. `work_tokens` is what was booked on the replica."""

    reservation_id: int
    replica_id: str
    boot_id: str
    known_tokens: int
    shared_tokens: int
    work_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """The router's view of one replica."""

    replica_id: str
    boot_id: str
    alive: bool
    pending_tokens: int
    num_outstanding: int
    known_blocks: int
    num_routed: int


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """The router's view of everything; counters since its start.

    `predicted_cached_tokens` against `actual_cached_tokens` tells how good its knowledge is.
    """

    policy: str
    replicas: tuple[ReplicaSnapshot, ...]
    shared_blocks: int
    num_reservations: int
    num_expired: int
    predicted_cached_tokens: int
    actual_cached_tokens: int


@dataclass(slots=True)
class _Replica:
    boot_id: str
    alive: bool = True
    pending_tokens: int = 0
    reservations: set[int] = field(default_factory=set)
    num_routed: int = 0


class Router:
    """Chooses replicas and keeps book; not thread-safe, no I/O.

    `shares` tells whether the replicas write to a shared tier, so that what one computed counts
    as a fetch, not as a computation, for the others.
    """

    def __init__(
        self,
        config: RouterConfig,
        tokens_per_block: int,
        shares: bool,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._tokens_per_block = tokens_per_block
        self._clock = clock
        self._work = WorkModel(config.fetch_cost, config.outstanding_cost)
        self._policy = make_policy(config.policy, self._work, rng or random.Random())
        self._replicas: dict[str, _Replica] = {}
        self._reservations = Reservations(config.reservation_timeout_s, config.stream_timeout_s)
        self._num_expired = self._predicted_cached = self._actual_cached = 0
        self._index = PrefixIndex()
        if shares:
            self._index.add_holder(SHARED_TIER, config.shared_index_blocks)

    def register(self, replica_id: str, boot_id: str, cache_blocks: int) -> bool:
        """Route to this replica from now on; True when that is news.

        `boot_id` tells a restarted process, which has an empty cache, from the old one; the same
        one again is a no-op unless the replica was marked dead. `cache_blocks` bounds what is
        believed of its cache.
        """
        known = self._replicas.get(replica_id)
        if known is not None and known.alive and known.boot_id == boot_id:
            return False
        self._forget(replica_id)
        num_routed = known.num_routed if known else 0
        self._replicas[replica_id] = _Replica(boot_id, num_routed=num_routed)
        self._index.add_holder(replica_id, cache_blocks)
        return True

    def mark_dead(self, replica_id: str, boot_id: str) -> bool:
        """Route no more to this process; its knowledge and reservations go. True when news.

        A report about another boot than the current one is late and does nothing.
        """
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.alive or replica.boot_id != boot_id:
            return False
        self._forget(replica_id)
        replica.alive = False
        return True

    def unregister(self, replica_id: str) -> None:
        """Forget a replica that will not come back; an unknown one is no error."""
        self._forget(replica_id)
        self._replicas.pop(replica_id, None)

    def cache_changed(self, replica_id: str, boot_id: str, changes: CacheChanges) -> bool:
        """Believe what a replica's engine says of its own memory; False when it is late.

        A report about another boot than the current one is about memory that is gone.
        """
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.alive or replica.boot_id != boot_id:
            return False
        self._index.apply(replica_id, changes)
        return True

    def route(
        self, hashes: Sequence[BlockHash], num_prompt_tokens: int, avoid: Collection[str] = ()
    ) -> Route | None:
        """Choose a replica for a prompt and book the work; None when none but `avoid` is alive.

        `hashes` are the prompt's full blocks that may be reused, first block first.
        """
        self._expire()
        prompt = PromptView(num_prompt_tokens, self._known_tokens(SHARED_TIER, hashes))
        able = [one for one, r in self._replicas.items() if r.alive and one not in avoid]
        candidates = [self._view(one, hashes) for one in able]
        if not candidates:
            return None
        return self._book(prompt, self._policy.choose(prompt, candidates), hashes)

    def first_token(self, reservation_id: int, receipt: Receipt) -> bool:
        """The prefill is done: release its work, learn from the receipt.

        False when the reservation has expired or went with its replica.
        """
        reservation = self._reservations.start(reservation_id, self._clock())
        if reservation is None:
            return False
        self._predicted_cached += max(reservation.known_tokens, reservation.shared_tokens)
        self._actual_cached += receipt.cached
        self._release_work(reservation)
        self._learn(reservation, receipt)
        return True

    def finished(self, reservation_id: int, hashes: Sequence[BlockHash] = ()) -> bool:
        """The request has ended, well or not; `hashes` are all blocks it has left in the caches.

        False when the reservation has expired or went with its replica.
        """
        reservation = self._reservations.get(reservation_id)
        if reservation is None:
            return False
        self._index.add(reservation.replica_id, hashes)
        if reservation.is_saved:
            self._index.add(SHARED_TIER, hashes)
        self._drop(reservation_id)
        return True

    def snapshot(self) -> RouterSnapshot:
        """What the router believes now."""
        self._expire()
        return RouterSnapshot(
            policy=self._config.policy,
            replicas=tuple(
                ReplicaSnapshot(
                    replica_id=replica_id,
                    boot_id=replica.boot_id,
                    alive=replica.alive,
                    pending_tokens=replica.pending_tokens,
                    num_outstanding=len(replica.reservations),
                    known_blocks=self._index.num_blocks(replica_id),
                    num_routed=replica.num_routed,
                )
                for replica_id, replica in sorted(self._replicas.items())
            ),
            shared_blocks=self._index.num_blocks(SHARED_TIER),
            num_reservations=len(self._reservations),
            num_expired=self._num_expired,
            predicted_cached_tokens=self._predicted_cached,
            actual_cached_tokens=self._actual_cached,
        )

    def _known_tokens(self, holder: str, hashes: Sequence[BlockHash]) -> int:
        return self._index.depth(holder, hashes) * self._tokens_per_block

    def _view(self, replica_id: str, hashes: Sequence[BlockHash]) -> ReplicaView:
        replica = self._replicas[replica_id]
        return ReplicaView(
            replica_id=replica_id,
            pending_tokens=replica.pending_tokens,
            num_outstanding=len(replica.reservations),
            known_tokens=self._known_tokens(replica_id, hashes),
        )

    def _book(self, prompt: PromptView, view: ReplicaView, hashes: Sequence[BlockHash]) -> Route:
        replica = self._replicas[view.replica_id]
        work = self._work.prefill(prompt, view.known_tokens)
        known, shared = view.known_tokens, prompt.shared_tokens
        reservation = Reservation(view.replica_id, hashes, work, known, shared)
        reservation_id = self._reservations.add(reservation, self._clock())
        replica.reservations.add(reservation_id)
        replica.pending_tokens += work
        replica.num_routed += 1
        self._index.add(view.replica_id, hashes)  # in flight counts as cached
        return Route(
            reservation_id=reservation_id,
            replica_id=view.replica_id,
            boot_id=replica.boot_id,
            known_tokens=view.known_tokens,
            shared_tokens=prompt.shared_tokens,
            work_tokens=work,
        )

    def _learn(self, reservation: Reservation, receipt: Receipt) -> None:
        """Correct what was believed when booking by what the prompt really found.

        Its blocks are in the replica now, so there only what was believed to follow them goes. A
        shared tier that did not give blocks may not take these either: the next report decides.
        """
        hashes, own_tokens = reservation.hashes, receipt.device + receipt.host
        if self._corrects(reservation.replica_id, hashes, reservation.known_tokens, own_tokens):
            self._index.add(reservation.replica_id, hashes)
        disproved = self._corrects(SHARED_TIER, hashes, reservation.shared_tokens, receipt.cached)
        reservation.is_saved = not disproved
        if not disproved:
            self._index.add(SHARED_TIER, hashes)

    def _corrects(
        self, holder: str, hashes: Sequence[BlockHash], believed_tokens: int, found_tokens: int
    ) -> bool:
        """Forget the first block that the holder turned out to lack, and all that follow it."""
        if found_tokens >= believed_tokens:
            return False
        self._index.forget(holder, hashes[found_tokens // self._tokens_per_block])
        return True

    def _release_work(self, reservation: Reservation) -> None:
        replica = self._replicas[reservation.replica_id]
        replica.pending_tokens -= reservation.work_tokens
        reservation.work_tokens = 0

    def _drop(self, reservation_id: int) -> None:
        reservation = self._reservations.pop(reservation_id)
        self._release_work(reservation)
        self._replicas[reservation.replica_id].reservations.discard(reservation_id)

    def _forget(self, replica_id: str) -> None:
        replica = self._replicas.get(replica_id)
        if replica is not None:
            for reservation_id in tuple(replica.reservations):
                self._drop(reservation_id)
        self._index.remove_holder(replica_id)

    def _expire(self) -> None:
        for reservation_id in self._reservations.expired(self._clock()):
            self._drop(reservation_id)
            self._num_expired += 1
