"""What ended requests have left to save, and how much of it was lost. Pure.

An engine frees a request's blocks when that ends, often before its last blocks had their turn. They
are copied before anything writes to them, held until they had it, or counted as lost: none may be
saved after somebody else has written to it.
"""

from shared_cache.connector.held_runs import HeldRuns
from shared_cache.connector.save_runs import RUN_ROOM, SaveRun


class EndedSaves:
    """Runs of ended requests, each given out once."""

    def __init__(self, *, holds: bool) -> None:
        """`holds`: the blocks of an ended request stay until all is saved."""
        self._holds = holds
        self._held = HeldRuns()
        self._early: list[SaveRun] = []
        self._num_lost = 0

    def leave(
        self, request_id: int, run: SaveRun | None, now_s: float, *, is_loading: bool
    ) -> bool:
        """A request has ended that has `run` left; True when its blocks must not be free yet."""
        is_held = is_loading or (self._holds and run is not None)
        if is_held:
            self._held.hold(request_id, run, now_s)
        elif run is not None:
            self._early.append(run)
        return is_held

    def take_early(self, room: int | None) -> tuple[SaveRun, ...]:
        """Blocks that nobody holds; what takes more than `room` is lost."""
        kept, ended = [], self._early
        self._early = []
        for run in ended:
            begun = run if room is None else run.leading(max(0, room - RUN_ROOM))
            self._num_lost += run.num_blocks - begun.num_blocks
            if not begun.num_blocks:
                continue
            kept.append(begun)
            if room is not None:
                room -= begun.room
        return tuple(kept)

    def take_leaving(
        self, room: int, most: int, now_s: float
    ) -> tuple[list[SaveRun], tuple[int, ...]]:
        """Blocks that are held, and who may go after that; what waited for too long is lost."""
        runs, gone, num_lost = self._held.take(room, most, now_s)
        self._num_lost += num_lost
        return runs, gone

    def lose_early(self) -> None:
        """What nobody holds has been written to."""
        self._num_lost += sum(run.num_blocks for run in self._early)
        self._early = []

    def lose(self, num_blocks: int) -> None:
        """Count blocks that are not even left to save."""
        self._num_lost += num_blocks

    def take_lost(self) -> int:
        """How many blocks were lost since this was asked."""
        num_lost, self._num_lost = self._num_lost, 0
        return num_lost
