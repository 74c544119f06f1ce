"""Turns a decided turn into one forward pass, and that into the tokens that the model chooses.

In two steps: a pass is put on the device, and what it chose is read when it is needed. Between them
the next pass may be put there, whose newest tokens only the device knows.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.engines.torch.batch import NO_HOOKS, LayerHooks, PackedBatch
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.forward import Forward
from actors.engines.torch.pass_times import PassTimes
from actors.engines.torch.pool import PagedPool, QuerySpan
from actors.engines.torch.scheduled import Scheduled, Turn
from actors.engines.torch.to_device import to_device, to_host

Sampler = Callable[[torch.Tensor, int], int]
"""(logits `[vocab]`, position) -> the token for `position`."""

Choices = dict[Scheduled, list[int] | None]
"""For each item that samples, the choice for the place after its last token and after each draft,
up to the first draft that is wrong. None stands for logits that are not finite."""

_NOT_FINITE = -1


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedPass:
    """A pass on the device: what it computes, and where the tokens appear that it chooses.

    `tokens` are the likeliest ones, row by row, in host memory once `is_there` has come; `samplers`
    choose from `logits` instead.
    """

    items: Sequence[Scheduled]
    logits: torch.Tensor
    tokens: torch.Tensor
    is_there: Any
    samplers: Mapping[int, Sampler]

    def choices(self) -> Choices:
        """What was chosen; waits for the pass if anything samples, and raises if it failed."""
        chosen: Choices = {}
        if not len(self.tokens):
            return chosen
        if self.is_there is not None:
            self.is_there.synchronize()
        tokens, end = self.tokens.tolist(), 0
        for item in (item for item in self.items if item.samples):
            start, end = end, end + 1 + len(item.drafts)
            sampler = self.samplers.get(item.sequence.request_id)
            if _NOT_FINITE in tokens[start:end]:
                chosen[item] = None
            elif sampler is None:
                chosen[item] = tokens[start:end]
            else:
                chosen[item] = _sample(item, self.logits[start:end], sampler)
        return chosen


class Runner:
    """Runs turns on one model and one pool. Used on the engine's thread only."""

    def __init__(
        self, forward: Forward, pool: PagedPool, connector: ConnectorDriver | None
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._connector = connector
        self._is_cuda = pool.tensor.is_cuda
        self._times = PassTimes(is_cuda=self._is_cuda)
        self._rows: dict[int, int] = {}  # by request: where the last pass chose its token
        self._ends: deque[Any] = deque()  # of the turns that the device may not be through with

    @property
    def runs_ahead(self) -> bool:
        """See `Forward.runs_ahead`."""
        return self._forward.runs_ahead

    def is_quick(self, turn: Turn) -> bool:
        """Whether launching `turn`, which computes something, takes no time."""
        return self._forward.is_quick([item.num_fed for item in turn.items])

    def warm_up(self) -> None:
        """The first passes, so that the first request does not pay for lazy initialisation."""
        self._forward.warm_up()

    def free_pool(self) -> None:
        """Let go of the pool's memory; nothing can run afterwards."""
        del self._pool, self._forward

    def launch(self, turn: Turn, samplers: Mapping[int, Sampler]) -> LaunchedPass | None:
        """Put `turn` on the device; None when it computes nothing.

        Requests whose id is not in `samplers` are greedy. Tokens that are not known yet must be
        those of the last pass.
        """
        stream = torch.cuda.current_stream() if self._is_cuda else None
        try:
            return self._run(turn, samplers, stream)
        finally:
            if stream is not None:
                self._ends.append(stream.record_event())
                self._await_turns_but_last()

    def _await_turns_but_last(self) -> None:
        """No turn but the last one is on the device any more, also where no tokens are read.

        Connectors count on that (see `LoadLeases`): what earlier turns loaded is loaded, and may go
        from host memory.
        """
        while len(self._ends) > 1:
            self._ends.popleft().synchronize()

    def _run(self, turn: Turn, samplers: Mapping[int, Sampler], stream: Any) -> LaunchedPass | None:
        if self._connector is not None:
            self._connector.begin_pass(turn, stream)
        # Not before: a fresh slot's last block may still be on its way to the host, and `stream`
        # waits for that in `begin_pass`.
        start = self._times.now()
        self._clear(turn.fresh_slots)
        launched = self._launch(turn, samplers, stream) if turn.items else None
        if launched is not None:
            self._times.note(turn.items, start)
        if self._connector is not None and turn.is_told:
            self._connector.end_pass(stream)
        for items, seconds in self._times.take_done():
            if self._connector is not None:
                self._connector.timed(items, seconds)
        return launched

    def _launch(self, turn: Turn, samplers: Mapping[int, Sampler], stream: Any) -> LaunchedPass:
        items = sorted(turn.items, key=lambda item: _span(item).group_key)
        batch = _batch(items, self._rows)
        logits = self._forward.logits(batch, self._layer_hooks(stream))
        self._rows, row = {}, 0
        for item in (item for item in items if item.samples):
            self._rows[item.sequence.request_id] = row
            row += 1 + len(item.drafts)
        if not len(logits):
            return LaunchedPass(items, logits, torch.empty(0), None, samplers)
        best, greedy = logits.max(dim=-1)
        tokens = torch.where(torch.isfinite(best), greedy, _NOT_FINITE)
        self._keep(tokens)
        if not self._is_cuda:
            return LaunchedPass(items, logits, tokens, None, samplers)
        host = to_host(tokens)
        is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        is_there.record()
        return LaunchedPass(items, logits, host, is_there, samplers)

    def _keep(self, tokens: torch.Tensor) -> None:
        """For the next pass, which may be launched before the host has read them."""
        chosen = self._forward.chosen
        if self._forward.runs_ahead and len(tokens) <= len(chosen):
            chosen[: len(tokens)] = tokens.clamp(min=0)

    def _layer_hooks(self, stream: object) -> LayerHooks:
        connector = self._connector
        if connector is None:
            return NO_HOOKS
        return LayerHooks(
            lambda layer: connector.before_layer(layer, stream),
            lambda layer: connector.after_layer(layer, stream),
        )

    def _clear(self, slots: Sequence[int]) -> None:
        """Zero slots whose old content is void.

        Masked places are multiplied by zero, not skipped, and zero times a NaN that some earlier
        request left behind would be NaN.
        """
        if slots:
            pool = self._pool.tensor
            pool.index_fill_(0, to_device(slots, pool.device), 0)


def _batch(items: Sequence[Scheduled], chosen_rows: Mapping[int, int]) -> PackedBatch:
    """All items in a row, with every place where a token is chosen.

    `chosen_rows` says by request where the last pass chose a token that is not known yet.
    """
    token_ids: list[int] = []
    unknown: list[tuple[int, int]] = []
    rows: list[int] = []
    for item in items:
        sequence = item.sequence
        token_ids += sequence.tokens[item.start : item.end]
        if sequence.num_unknown:
            unknown.append((len(token_ids), chosen_rows[sequence.request_id]))
            token_ids.append(0)
        token_ids += item.drafts
        if item.samples:
            rows += range(len(token_ids) - 1 - len(item.drafts), len(token_ids))
    sources = [-1] * len(token_ids) if unknown else []
    for place, row in unknown:
        sources[place] = row
    return PackedBatch(token_ids, [_span(item) for item in items], rows, sources)


def _span(item: Scheduled) -> QuerySpan:
    return QuerySpan(item.start, item.num_fed, item.sequence.slots)


def _sample(item: Scheduled, logits: torch.Tensor, sampler: Sampler) -> list[int]:
    chosen: list[int] = []
    for index, position in enumerate(range(item.end, item.end + len(logits))):
        chosen.append(sampler(logits[index], position))
        if index < len(item.drafts) and chosen[index] != item.drafts[index]:
            break
    return chosen
