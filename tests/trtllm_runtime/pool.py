"""One rank's KV pool on a CPU, in TensorRT-LLM's shape, with an oracle that no byte escapes.

A forward pass reads all KV before the tokens that it computes. Here it compares every byte of that
with what the model would have written, then writes its own. Behind blocks that the engine itself
left uncomputed nothing is compared, and garbage written: that must not leave the device.
New blocks are scribbled over first, so that nobody finds right bytes in them by luck.
"""

from dataclasses import dataclass

import torch

from tests.trtllm_runtime.oracle import LAYOUT, PLANES, State, kv_of

SIZE = LAYOUT.tokens_per_block
SCRIBBLE = 0xEE
GARBAGE = 0xDD


class WrongBytesError(AssertionError):
    """A forward pass would have attended to KV that is not that of its own prefix."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One request's part of a forward pass, as it stands when the pass is launched.

    Tokens before `start` are read, those from there to `stop` written. `fresh` are blocks that were
    allocated since the request's last pass and hold nothing that was promised. `is_poisoned`: the
    engine itself gave it blocks that nobody computed, so all that it computes is garbage.
    """

    request_id: int
    blocks: tuple[int, ...]
    states: tuple[State, ...]
    start: int
    stop: int
    fresh: tuple[int, ...] = ()
    is_poisoned: bool = False


class RankPool:
    """The pool of one rank: `[num_blocks, num_layers, kv_factor, heads * tokens * head_dim]`."""

    def __init__(self, num_blocks: int, rank: int) -> None:
        self.rank = rank
        shape = (num_blocks, LAYOUT.num_layers, LAYOUT.kv_factor, SIZE * LAYOUT.head_dim)
        self.tensor = torch.full(shape, -1.0, dtype=torch.float32)
        flat = self.tensor.view(num_blocks, -1).view(torch.uint8).numpy()
        self.rows = flat.reshape(num_blocks, PLANES, SIZE, -1)
        self.num_checked_tokens = 0

    def forward(self, part: Pass) -> None:
        """Check all that `part` reads, then write what it computes."""
        for block in part.fresh:
            self.rows[block] = SCRIBBLE
        if part.is_poisoned:
            self._each(part, part.start, part.stop, self._write_garbage)
            return
        self.check(part)
        self._each(part, part.start, part.stop, self._write)

    def check(self, part: Pass) -> None:
        """Raise `WrongBytesError` unless all KV before `part.start` is right."""
        self._each(part, 0, part.start, self._compare)

    def copy(self, source: int, target: int) -> None:
        """A partial match takes another block's bytes along."""
        self.rows[target] = self.rows[source]

    def scribble(self, block: int, offset: int) -> None:
        """Nobody knows any more what this token's KV is."""
        self.rows[block][:, offset] = SCRIBBLE

    def _each(self, part: Pass, start: int, stop: int, act) -> None:  # type: ignore[no-untyped-def]
        while start < stop:
            index = start // SIZE
            end = min(stop, (index + 1) * SIZE)
            act(part, index, start % SIZE, part.states[start:end])
            start = end

    def _compare(self, part: Pass, index: int, offset: int, states: tuple[State, ...]) -> None:
        found = self.rows[part.blocks[index]][:, offset : offset + len(states)]
        self.num_checked_tokens += len(states)
        if found.tobytes() != kv_of(states, self.rank).tobytes():
            raise WrongBytesError(
                f"rank {self.rank}, request {part.request_id}: block {index} of its prefix "
                f"(block {part.blocks[index]} of the pool) holds wrong bytes"
            )

    def _write(self, part: Pass, index: int, offset: int, states: tuple[State, ...]) -> None:
        self.rows[part.blocks[index]][:, offset : offset + len(states)] = kv_of(states, self.rank)

    def _write_garbage(
        self, part: Pass, index: int, offset: int, states: tuple[State, ...]
    ) -> None:
        self.rows[part.blocks[index]][:, offset : offset + len(states)] = GARBAGE
