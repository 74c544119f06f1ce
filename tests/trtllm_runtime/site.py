"""What outlives a replica in these tests: stores, their weather, and the truth about every block.

A tier may fail, lie, tear, hang or be full; the same medium is there again after a restart.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto

from shared_cache.connector.identity import reuse_scope
from shared_cache.errors import StoreError, StoreFullError
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes
from shared_cache.namespace import Namespace
from shared_cache.stores.store import BlockRun, BlockStore, MemoryBlockStore, StoredRun
from tests.shared_cache.fakes import WAIT_S, FakeClock
from tests.trtllm_runtime.oracle import LAYOUT, block_bytes
from tests.trtllm_runtime.requests import LaterLlmRequestBase, LlmRequestBase, Request

SIZE = LAYOUT.tokens_per_block


class Mood(Enum):
    """How the store of all replicas behaves now."""

    FINE = auto()
    FAILS = auto()
    LIES = auto()
    """It says that it has what it has not."""
    TEARS = auto()
    """It scribbles over all buffers, and only the first half of a read is good."""
    HANGS = auto()
    FULL = auto()


class Weather:
    """The mood of the store, for all that use it; whoever hangs goes on when it changes."""

    def __init__(self) -> None:
        self._mood = Mood.FINE
        self._changed = threading.Condition()

    @property
    def mood(self) -> Mood:
        """How it is now."""
        return self._mood

    def change(self, mood: Mood) -> None:
        """From now on it is so."""
        with self._changed:
            self._mood = mood
            self._changed.notify_all()

    def suffer(self) -> Mood:
        """What every operation goes through first; the mood that it then has."""
        with self._changed:
            ended = self._changed.wait_for(lambda: self._mood is not Mood.HANGS, WAIT_S)
            assert ended, "a test left its store hanging"
            if self._mood is Mood.FAILS:
                raise StoreError("the store fails today")
            return self._mood


class WeatheredStore(BlockStore):
    """One rank's store on a medium that outlives it."""

    def __init__(self, medium: MemoryBlockStore, weather: Weather) -> None:
        super().__init__(medium.namespace)
        self._medium = medium
        self._weather = weather

    def match(self, hashes: Sequence[BlockHash]) -> int:
        lies = self._weather.suffer() is Mood.LIES
        return len(hashes) if lies else self._medium.match(hashes)

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        tears = self._weather.suffer() is Mood.TEARS
        good = len(hashes) // 2 if tears else len(hashes)
        for buffer in buffers[good:]:
            buffer.cast("B")[:] = b"\xcc" * buffer.nbytes
        return self._medium.read_into(hashes[:good], buffers[:good])

    def write(self, run: BlockRun) -> int:
        if self._weather.suffer() is Mood.FULL:
            raise StoreFullError("the store is full today")
        return self._medium.write(run)

    def entries(self) -> Iterator[StoredRun]:
        return self._medium.entries()

    def delete(self, name: str) -> None:
        self._medium.delete(name)


class Site:
    """The media of all ranks, one clock, and every request that was ever made here."""

    def __init__(self, tp_size: int = 1, *, is_later: bool = False) -> None:
        self._base = LaterLlmRequestBase if is_later else LlmRequestBase
        self.weather = Weather()
        self.clock = FakeClock()
        self.namespaces = [
            Namespace("m", "r", "tensorrt_llm-1.2", LAYOUT, tp_rank=rank, tp_size=tp_size)
            for rank in range(tp_size)
        ]
        self.media = [MemoryBlockStore(namespace) for namespace in self.namespaces]
        self._truth: dict[BlockHash, tuple[Request, int]] = {}

    def stores(self) -> list[BlockStore]:
        """A store for each rank."""
        return [WeatheredStore(medium, self.weather) for medium in self.media]

    def learn(self, requests: Iterable[Request]) -> None:
        """Note what the blocks of these requests hold, as far as they came.

        Not those of pictures, should the connector not tell them apart: it must not save them. Nor
        those from media on of which nobody tells it: they have the names of text.
        """
        for request in requests:
            if not request.multimodal_hashes or self.tells_pictures_apart:
                media, hashes = request.unhashed_media, self.hashes_of(request)
                num_text = len(hashes) if media is None else media[0] // SIZE
                for index, name in enumerate(hashes[:num_text]):
                    self._truth[name] = request, index

    @property
    def tells_pictures_apart(self) -> bool:
        """Whether the connector names the blocks of two pictures differently."""
        scopes = [self.scope_of(Request(0, (1,), multimodal_hashes=m)) for m in (None, ((1,),))]
        return scopes[0] != scopes[1]

    def scope_of(self, request: Request) -> ReuseScope:
        """Who may reuse the blocks of this request, as the connector sees it."""
        return reuse_scope(self._base(request))

    def hashes_of(
        self, request: Request, tokens: Sequence[int] | None = None
    ) -> Sequence[BlockHash]:
        """The names of the request's full blocks, or of those of `tokens` in its place."""
        tokens = request.tokens if tokens is None else tokens
        return block_hashes(tokens, SIZE, self.scope_of(request))

    def truth(self, name: BlockHash, rank: int) -> bytes:
        """What block `name` holds; fails for a block that no request ever computed."""
        assert name in self._truth, "a block has a name that no request's prefix has"
        request, index = self._truth[name]
        return block_bytes(request.trail, index, rank)

    def check(self) -> int:
        """Every stored block is right; how many there are on rank 0."""
        for rank, medium in enumerate(self.media):
            for name, (_, payload) in list(medium._blocks.items()):
                assert payload == self.truth(name, rank), f"rank {rank} stored wrong bytes"
        return len(self.media[0]._blocks)

    def lose_blocks(self, keep_every: int) -> None:
        """Somebody deletes blocks behind everybody's back."""
        for medium in self.media:
            with medium._lock:
                kept = list(medium._blocks.items())[::keep_every]
                medium._blocks = dict(kept)
