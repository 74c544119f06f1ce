"""A request is staged under the scope that the engine's connector will match, not under its own."""

from actors.admission import StagingQueue
from actors.engine import GenerationRequest, SamplingParams
from shared_cache.hashing import ReuseScope, block_hashes
from tests.fakes import TOKENS_PER_BLOCK, FakeCache, FakeEngine

PROMPT = tuple(range(1, 4 * TOKENS_PER_BLOCK + 2))
OWN, STORED = ReuseScope("tenant"), ReuseScope("number 7")


class Translating(FakeEngine):
    """Its connector is told other words; its device is asked about in the request's own."""

    def __init__(self, cache: FakeCache) -> None:
        super().__init__(cache=cache)
        self.asked: list[object] = []

    def storage_scope(self, scope: ReuseScope) -> ReuseScope:
        return STORED if scope == OWN else scope

    def num_device_blocks(self, hashes):
        self.asked.append(tuple(hashes))
        return 1


async def staged(scope: ReuseScope) -> tuple[Translating, FakeCache]:
    cache = FakeCache()
    engine = Translating(cache)
    queue = StagingQueue("replica", 2)
    request = GenerationRequest("r", PROMPT, SamplingParams(2), scope)
    async for _ in queue.stream(engine, request):
        pass
    queue.close()
    return engine, cache


async def test_what_is_stored_is_staged_and_what_is_asked_of_the_device_is_its_own():
    engine, cache = await staged(OWN)
    own = tuple(block_hashes(PROMPT[:-1], TOKENS_PER_BLOCK, OWN))
    stored = block_hashes(PROMPT[:-1], TOKENS_PER_BLOCK, STORED)
    assert engine.asked[0] == own
    assert cache.scopes[0] == STORED
    assert [list(one) for one in cache.staged] == [list(stored[1:])]


async def test_most_scopes_are_stored_as_they_are():
    engine, cache = await staged(ReuseScope())
    assert cache.scopes[0] == ReuseScope()
    assert engine.asked[0] == tuple(block_hashes(PROMPT[:-1], TOKENS_PER_BLOCK))
