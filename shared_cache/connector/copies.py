"""Copies between host slots and an engine's pool, as the connector's worker asks for them.

The worker decides what is copied and when, and must not care where the pool lies: one small class
per kind of device does what is said here. A block is opaque bytes: one row of the pool, one host
slot.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared_cache.hashing import BlockHash
from shared_cache.host.interface import PlacedBlocks

BlockCopy = tuple[memoryview, int]
"""One host slot's bytes and the device block that belongs to it."""


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Blocks in host memory, and the device block that each of them goes to."""

    blocks: PlacedBlocks
    device_blocks: Sequence[int]

    def pairs(self) -> Iterator[BlockCopy]:
        """Block by block."""
        return zip(self.blocks.views(), self.device_blocks, strict=True)


BlockSave = tuple[memoryview, int, BlockHash]
"""The same for a block to save, with its name."""

OnLoaded = Callable[[], None]
"""Called when blocks are loaded."""

OnFailed = Callable[[Exception], None]
"""Called instead when that failed, with the error."""

OnDone = Callable[[float, Sequence[int]], None]
"""Called when blocks are saved, with the seconds of copying and the blocks' checksums."""


class BlockCopier(Protocol):
    """Moves whole blocks. `stream` is a CUDA stream, or None on a CPU."""

    def load(self, loads: Sequence[BlockLoad], stream: Any) -> None:
        """Copy host -> device, done before anything that is enqueued on `stream` afterwards."""

    def load_beside(
        self, loads: Sequence[BlockLoad], stream: Any, on_done: OnLoaded | None = None
    ) -> Callable[[], bool]:
        """Copy host -> device after what is on `stream`, which does not wait; tells when done.

        `on_done` is called then, too, once and by any thread; what is given may say so before.
        """

    def before_writes(self, blocks: Collection[int] | None, stream: Any) -> None:
        """What is enqueued on `stream` afterwards may write to `blocks`, or to all (None).

        To be called before these are loaded, too: saves of them must have read them.
        """

    def save(
        self, copies: Sequence[BlockSave], stream: Any, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """Copy device -> host after what is enqueued on `stream`; then call `on_done` once.

        Instead `on_failed` is called once, perhaps by another thread, when nothing more will be
        written to the host; nothing is raised.
        """

    @property
    def prepare(self) -> Callable[[memoryview], None]:
        """Makes copies from and to host memory fast; not called in the step.

        It may outlive the copier, and keeps neither that nor the pool alive.
        """

    def close(self) -> None:
        """Wait until every save's `on_done` has returned; give back what was prepared."""
