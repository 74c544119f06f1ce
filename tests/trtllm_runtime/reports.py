"""`SchedulerOutput`, turn by turn, as the manager's bookkeeping makes it.

It reports differences to what it reported before under the same id. On 1.2 nothing is ever removed
from that, so an id that comes again is never new; later versions forget an id when it is reset.
"""

from dataclasses import dataclass, field

from shared_cache.connector.interface import RequestData, SchedulerOutput
from tests.trtllm_runtime.requests import Request, State


@dataclass
class LaterRequestData(RequestData):
    """With what versions after 1.2 add."""

    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None


@dataclass
class Batch:
    """The requests of one forward pass."""

    context: list[Request] = field(default_factory=list)
    generation: list[Request] = field(default_factory=list)

    @property
    def all(self) -> list[Request]:
        """All of them."""
        return [*self.context, *self.generation]


@dataclass
class _Reported:
    num_tokens: int = 0
    num_blocks: int = 0


class Reporter:
    """What was told of each request so far. `is_later`: of a version after 1.2."""

    def __init__(self, *, is_later: bool = False) -> None:
        self._is_later = is_later
        self._reported: dict[int, _Reported] = {}
        self._external_loads: dict[int, int] = {}

    def matched(self, request_id: int, num_tokens: int) -> None:
        """The connector promised so many tokens in this turn."""
        self._external_loads[request_id] = num_tokens

    def forget(self, request_id: int) -> None:
        """Later versions: an id that is reset is new again."""
        self._reported.pop(request_id, None)

    def build(self, batch: Batch, parked: set[int]) -> SchedulerOutput:
        """This turn's report; requests that were parked in this turn are left out."""
        output = SchedulerOutput()
        for request in batch.context:
            if request.request_id in parked:
                continue
            is_new = request.request_id not in self._reported
            data = self._data(request)
            data.computed_position -= self._external_loads.get(request.request_id, 0)
            (output.new_requests if is_new else output.cached_requests).append(data)
        output.cached_requests += map(self._data, batch.generation)
        self._external_loads = {}
        return output

    def _data(self, request: Request) -> RequestData:
        told = self._reported.setdefault(request.request_id, _Reported())
        tokens, blocks = request.tokens[: request.num_visible], list(request.blocks or [])
        new_tokens, new_blocks = tokens[told.num_tokens :], blocks[told.num_blocks :]
        told.num_tokens = max(told.num_tokens, len(tokens))
        told.num_blocks = max(told.num_blocks, len(blocks))
        if request.state in (State.CONTEXT_INIT, State.DISAGG_GENERATION_TRANS_IN_PROGRESS):
            position = request.context_position
            num_scheduled = min(request.context_remaining, request.chunk_size)
        else:
            position, num_scheduled = len(tokens) - 1, 1
        fields = (request.request_id, new_tokens, new_blocks, position, num_scheduled)
        if self._is_later:
            return LaterRequestData(*fields, cache_salt=request.cache_salt)
        return RequestData(*fields)
