"""What is computed in one turn, for whom, and in which slots. Pure."""

from dataclasses import dataclass

from actors.engines.torch.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Scheduled:
    """`num_tokens` tokens of one sequence from position `start` on, then unverified `drafts`.

    `samples` says that this reaches the sequence's end, so the next token comes out.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position after the last token, drafts not counted."""
        return self.start + self.num_tokens

    @property
    def num_fed(self) -> int:
        """Tokens fed to the model, drafts included."""
        return self.num_tokens + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine turn.

    `fresh_slots` were newly allocated for it and are not loaded: their old content is void.
    `loaded_slots` were allocated, too, and get theirs from a connector; `parked` are the sequences
    that are admitted with this turn and computed only when their loads are done. `ending` are those
    whose last token is not known yet and whose last whole block is complete: nothing of them is
    computed any more, and a connector has not been told of that block. `arrived` are those that
    only load, and have all that there is for them when this turn's loads are done.
    """

    items: tuple[Scheduled, ...]
    fresh_slots: tuple[int, ...]
    loaded_slots: tuple[int, ...] = ()
    parked: tuple[Sequence, ...] = ()
    ending: tuple[Sequence, ...] = ()
    arrived: tuple[Sequence, ...] = ()

    @property
    def is_told(self) -> bool:
        """Whether a connector is told of any request: it may have to save something."""
        return bool(self.items or self.ending or self.arrived)

    @property
    def taken_slots(self) -> tuple[int, ...]:
        """All that were newly allocated."""
        return self.fresh_slots + self.loaded_slots

    def __bool__(self) -> bool:
        return self.is_told or bool(self.parked)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that this turn is about."""
        computed = tuple(item.sequence for item in self.items)
        return computed + self.parked + self.ending + self.arrived


def verified(drafts: tuple[int, ...], chosen: list[int]) -> list[int]:
    """The tokens that are certain: drafts as far as they were chosen, and the token after them.

    `chosen[i]` is the model's choice for the place of `drafts[i]`, the last one for the place
    after all drafts.
    """
    for index, (draft, choice) in enumerate(zip(drafts, chosen, strict=False)):
        if draft != choice:
            return chosen[: index + 1]
    return chosen
