"""Turns a decided turn into one forward pass and the tokens that the model chooses."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from actors.engines.torch.attention import PagedPass, PagedPool, QuerySpan
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.scheduler import Scheduled, Turn

Sampler = Callable[[torch.Tensor, int], int]
"""(logits `[vocab]`, position) -> the token for `position`."""

Choices = dict[Scheduled, list[int] | None]
"""For each item that samples, the choice for the place after its last token and after each draft,
up to the first draft that is wrong. None stands for logits that are not finite."""


class Runner:
    """Runs turns on one model and one pool. Used on the engine's thread only."""

    def __init__(
        self, model: LoadedModel, pool: PagedPool, connector: ConnectorDriver | None
    ) -> None:
        self._model = model
        self._pool = pool
        self._connector = connector
        self._is_cuda = pool.tensor.is_cuda
        self._is_idle = True  # the device has finished all turns so far

    def warm_up(self) -> None:
        """One tiny pass, so that the first request does not pay for lazy initialisation."""
        span = QuerySpan(0, 1, (0,))
        self._model.logits([0], [0], PagedPass(self._pool, [span]), [0])
        self._clear((0,))

    def free_pool(self) -> None:
        """Let go of the pool's memory; nothing can run afterwards."""
        del self._pool

    def run(self, turn: Turn, samplers: Mapping[int, Sampler]) -> Choices:
        """Compute `turn`. Requests whose id is not in `samplers` are greedy."""
        stream = torch.cuda.current_stream() if self._is_cuda else None
        if self._connector is not None:
            self._connector.begin_pass(turn.items, stream)
        # Not before: a fresh slot's last block may still be on its way to the host, and `stream`
        # waits for that in `begin_pass`.
        began_idle, started_s = self._is_idle, time.perf_counter()
        self._clear(turn.fresh_slots)
        items = sorted(turn.items, key=lambda item: _span(item).group_key)
        logits = self._forward(items, stream)
        launched_s = time.perf_counter()
        if self._connector is not None:
            self._connector.end_pass(stream)
        saved_s = time.perf_counter()
        choices = _choose(items, logits, samplers)  # waits for the device if anything samples
        self._is_idle = bool(choices) or not self._is_cuda
        if self._connector is not None and began_idle and self._is_idle:
            seconds = launched_s - started_s + time.perf_counter() - saved_s
            self._connector.timed(turn.items, seconds)
        return choices

    def _forward(self, items: Sequence[Scheduled], stream: object) -> torch.Tensor:
        """Logits of every place where a token is chosen, in the order of `items`."""
        connector = self._connector
        hooks = []
        if connector is not None:
            hooks = [
                lambda layer: connector.before_layer(layer, stream),
                lambda layer: connector.after_layer(layer, stream),
            ]
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for item in items:
            token_ids += item.sequence.tokens[item.start : item.end]
            token_ids += item.drafts
            positions += range(item.start, item.start + item.num_fed)
            if item.samples:
                rows += range(len(token_ids) - 1 - len(item.drafts), len(token_ids))
        paged = PagedPass(self._pool, [_span(item) for item in items], *hooks)
        return self._model.logits(token_ids, positions, paged, rows)

    def _clear(self, slots: Sequence[int]) -> None:
        """Zero slots whose old content is void.

        Masked places are multiplied by zero, not skipped, and zero times a NaN that some earlier
        request left behind would be NaN.
        """
        if slots:
            index = torch.tensor(slots, device=self._pool.tensor.device)
            self._pool.tensor.index_fill_(0, index, 0)


def _span(item: Scheduled) -> QuerySpan:
    return QuerySpan(item.start, item.num_fed, item.sequence.slots)


def _choose(
    items: Sequence[Scheduled], logits: torch.Tensor, samplers: Mapping[int, Sampler]
) -> Choices:
    chosen: Choices = {}
    if not len(logits):
        return chosen
    best, greedy = logits.max(dim=-1)
    finite, tokens = torch.isfinite(best).tolist(), greedy.tolist()
    end = 0
    for item in (item for item in items if item.samples):
        start, end = end, end + 1 + len(item.drafts)
        sampler = samplers.get(item.sequence.request_id)
        if not all(finite[start:end]):
            chosen[item] = None
        elif sampler is None:
            chosen[item] = tokens[start:end]
        else:
            chosen[item] = _sample(item, logits[start:end], sampler)
    return chosen


def _sample(item: Scheduled, logits: torch.Tensor, sampler: Sampler) -> list[int]:
    chosen: list[int] = []
    for index, position in enumerate(range(item.end, item.end + len(logits))):
        chosen.append(sampler(logits[index], position))
        if index < len(item.drafts) and chosen[index] != item.drafts[index]:
            break
    return chosen
