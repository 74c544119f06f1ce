"""How a turn is computed: what the runner asks for, and the plain way to do it.

Plain means transformers' own layers over the paged pool: on a CPU, and on GPUs where nothing faster
is there. The fast way on a GPU is `cuda/forward.py`.

A host that waits for a pass's tokens before it prepares the next one leaves the device idle
meanwhile. So tokens that were chosen stay on the device, too, where the next pass finds them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from actors.engines.torch.attention import AttentionPass, PagedPass
from actors.engines.torch.batch import NO_HOOKS, LayerHooks, PackedBatch
from actors.engines.torch.model import LoadedModel
from actors.engines.torch.pool import PagedPool, QuerySpan
from actors.engines.torch.to_device import to_device

MakePass = Callable[[PagedPool, Sequence[QuerySpan], LayerHooks], AttentionPass]


class Forward(Protocol):
    """One model over one pool. Used on the engine's thread only."""

    @property
    def chosen(self) -> torch.Tensor:
        """`[max sequences]`, int32: what the last pass chose, for `PackedBatch.chosen_rows`.

        Whoever chooses writes it, in the order of the passes.
        """

    @property
    def runs_ahead(self) -> bool:
        """Whether a pass can be put on the device while the one before it is running there."""

    def is_quick(self, counts: Sequence[int]) -> bool:
        """Whether putting a pass over spans of so many tokens each on the device takes no time."""

    def warm_up(self) -> None:
        """Pay for lazy initialisation now. What it writes to the pool is cleared again."""

    def logits(self, batch: PackedBatch, hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """Logits `[len(batch.rows), vocab]`; writes the KV of all tokens to the pool.

        `hooks` are called around every layer, except in passes that a CUDA graph replays.
        """


class PlainForward:
    """Transformers' layers, with attention that finds its blocks through `make_pass`."""

    runs_ahead = False

    def __init__(
        self,
        model: LoadedModel,
        pool: PagedPool,
        make_pass: MakePass = PagedPass,
        max_sequences: int = 1,
    ) -> None:
        self._network = model.network
        self._pool = pool
        self._make_pass = make_pass
        self.chosen = torch.zeros(max_sequences, dtype=torch.int32, device=pool.tensor.device)

    def is_quick(self, counts: Sequence[int]) -> bool:
        """See `Forward.is_quick`: each layer is launched by the host."""
        return False

    def warm_up(self) -> None:
        """See `Forward.warm_up`."""
        self.logits(PackedBatch([0], [QuerySpan(0, 1, (0,))], [0]))
        self._pool.tensor[0].zero_()

    def logits(self, batch: PackedBatch, hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """See `Forward.logits`."""
        network, device = self._network, self._pool.tensor.device
        token_ids = to_device(batch.token_ids, device)
        if batch.chosen_rows:
            rows = to_device(batch.chosen_rows, device)
            token_ids = filled_in(token_ids, rows, self.chosen)
        hidden = network.model(
            input_ids=token_ids[None],
            position_ids=to_device(batch.positions, device)[None],
            use_cache=False,
            paged=self._make_pass(self._pool, batch.spans, hooks),
        ).last_hidden_state[0]
        return logits_of(network.lm_head, hidden, batch.rows)


def filled_in(
    token_ids: torch.Tensor, chosen_rows: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """`token_ids`, with those of `chosen` where `chosen_rows` are not negative."""
    found = chosen.index_select(0, chosen_rows.clamp(min=0)).to(token_ids.dtype)
    return torch.where(chosen_rows < 0, token_ids, found)


def logits_of(lm_head: torch.nn.Module, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`[len(rows), vocab]` from `[total, hidden]`; `rows` are in order."""
    if rows and rows[-1] == len(rows) - 1:
        hidden = hidden[: len(rows)]
    elif len(rows) < len(hidden):
        hidden = hidden[to_device(rows, hidden.device)]
    logits: torch.Tensor = lm_head(hidden)
    return logits
