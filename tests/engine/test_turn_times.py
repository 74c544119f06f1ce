"""What the engine tells the cost gate: how long turns of prompts take, and turns that decode."""

import asyncio
import time
from typing import Any

from actors.engines.torch.pool import PagedPool
from tests.engine.conftest import MakeEngine, request, some_prompt, tokens
from tests.engine.recording import RecordingConnector

COPY_S = 0.05


class SlowCopies(RecordingConnector):
    """Copies take their time before and after the forward pass."""

    def start_load_kv(self, stream: Any) -> None:
        super().start_load_kv(stream)
        time.sleep(COPY_S)

    def wait_for_save(self, stream: Any) -> None:
        super().wait_for_save(stream)
        time.sleep(COPY_S)


class Noted:
    """Stands for the cache with its gate and budget."""

    def __init__(self) -> None:
        self.gate = self.turn_budget = self
        self.prefills: list[tuple[list[tuple[int, int]], float]] = []
        self.decodes: list[float] = []
        self.is_flush_hopeless = False

    def saw_prefill(self, spans: Any, seconds: float) -> None:
        self.prefills.append((list(spans), seconds))

    def saw_decode_turn(self, seconds: float) -> None:
        self.decodes.append(seconds)

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        pass


class Pair:
    def __init__(self) -> None:
        self.noted = Noted()

    def __call__(self, pool: PagedPool) -> tuple[Any, Any, Any]:
        made = SlowCopies(pool, {})
        return made, made, self.noted


async def test_turns_of_prompts_and_of_decoding_are_told_without_their_copies(
    make_connected_engine: MakeEngine,
) -> None:
    pair = Pair()
    engine = make_connected_engine(pair, max_num_tokens=16)
    await tokens(engine, request(some_prompt(40), 4, ignore_eos=True))
    engine.close()
    noted = pair.noted
    assert [spans for spans, _ in noted.prefills] == [[(0, 16)], [(16, 16)], [(32, 8)]]
    assert len(noted.decodes) == 3
    seconds = [seconds for _, seconds in noted.prefills] + noted.decodes
    assert all(0 < one < 2 * COPY_S for one in seconds)


async def test_turns_that_mix_both_are_not_told(make_connected_engine: MakeEngine) -> None:
    pair = Pair()
    engine = make_connected_engine(pair, max_num_tokens=16)
    first = asyncio.create_task(tokens(engine, request(some_prompt(8), 30, ignore_eos=True)))
    while not pair.noted.decodes:
        await asyncio.sleep(0)
    await tokens(engine, request(some_prompt(24, seed=1), 2, "late", ignore_eos=True))
    await first
    engine.close()
    assert [spans for spans, _ in pair.noted.prefills] == [[(0, 8)]]
