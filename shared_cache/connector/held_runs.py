"""What ended requests have left to save, where their blocks are held for that. Pure."""

from dataclasses import dataclass

from shared_cache.connector.save_runs import RUN_ROOM, SaveRun

LEAVING_S = 5.0
"""So long the blocks of an ended request are held: somebody else may want the memory."""


@dataclass(slots=True)
class _Left:
    run: SaveRun | None
    since_s: float


class HeldRuns:
    """Requests that have ended and may not go yet, first come, first saved."""

    def __init__(self) -> None:
        self._left: dict[int, _Left] = {}

    def hold(self, request_id: int, run: SaveRun | None, now_s: float) -> None:
        """A request that has `run` left; with None it only waits to be told that it may go."""
        self._left[request_id] = _Left(run, now_s)

    def take(
        self, room: int, most: int, now_s: float
    ) -> tuple[list[SaveRun], tuple[int, ...], int]:
        """What to save now, who may go after that, and how many blocks waited for too long.

        Runs take `room` at most (see `SaveRun.room`), and have `most` blocks.
        """
        runs, gone, num_lost = [], [], 0
        for request_id, left in self._left.items():
            num_blocks = max(0, min(room - RUN_ROOM, most))
            if left.run is not None and num_blocks:
                part = left.run.leading(num_blocks)
                runs.append(part)
                room, most = room - part.room, most - part.num_blocks
                is_all = part.num_blocks == left.run.num_blocks
                left.run = None if is_all else left.run.behind(part.num_blocks)
            if left.run is None or now_s - left.since_s > LEAVING_S:
                num_lost += left.run.num_blocks if left.run is not None else 0
                gone.append(request_id)
        for request_id in gone:
            del self._left[request_id]
        return runs, tuple(gone), num_lost
