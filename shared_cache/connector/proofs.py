"""What is known to be computed, and who may have left blocks behind that are not. Pure.

An engine tells of no forward pass that failed, and not of every request that was aborted, and keeps
the blocks of both. So a pass counts as done once one of its requests goes on, and a request as
alive in the turns that report it; what rests on anything else must not be saved.
"""

from collections.abc import Mapping, Sequence

from shared_cache.connector.doubts import reaches_into
from shared_cache.connector.requests import Ground, ReportedRequest, TrackedRequest
from shared_cache.hashing import BlockHashChain

Requests = Mapping[int, TrackedRequest]


class Proofs:
    """The forward passes that went well, and the requests that this turn reports."""

    def __init__(self) -> None:
        self._turns: set[int] = set()
        self._reported_now: set[int] = set()

    def note_turn(
        self,
        requests: Requests,
        new_requests: Sequence[ReportedRequest],
        cached_requests: Sequence[ReportedRequest],
    ) -> None:
        """A pass that fails ends all its requests: one that goes on proves the pass it was in."""
        self._reported_now = {one.request_id for one in (*new_requests, *cached_requests)}
        for report in cached_requests:
            request = requests.get(report.request_id)
            if request is not None and request.is_reported:
                self._turns.add(request.seen_turn)

    def forget_turns(self, requests: Requests) -> None:
        """Keep only the passes that some request was in last."""
        self._turns &= {request.seen_turn for request in requests.values()}

    def uncomputed_from(self, request: TrackedRequest) -> int | None:
        """The first block of its prompt that an engine may keep uncomputed, if any."""
        return request.uncomputed_from(self._turns)

    def grounds(
        self, requests: Requests, chain: BlockHashChain, num_device_tokens: int
    ) -> list[Ground]:
        """The requests whose uncomputed blocks may be in this device prefix, should they be gone.

        Of those that have vanished nobody tells, so each counts that is not known to have ended.
        """
        grounds = []
        for request_id, request in requests.items() if num_device_tokens else ():
            start = self.uncomputed_from(request)
            if start is None or not reaches_into(chain, num_device_tokens, request.chain, start):
                continue
            is_all = reaches_into(chain, num_device_tokens, request.chain, request.num_valid)
            grounds.append(Ground(request_id, request.seen_turn, is_launched=not is_all))
        return grounds

    def is_firm(self, ground: Ground) -> bool:
        """Whether that request is still there, or at least its last forward pass went well."""
        is_proven = ground.is_launched and ground.seen_turn in self._turns
        return is_proven or ground.request_id in self._reported_now
