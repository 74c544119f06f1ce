"""When a batch sender sends: at once, a little later, or at the end of its loop."""

import asyncio
import time

import pytest

from actors.batch_sender import BatchSender

LONG_S = 60.0


class Things:
    """What is to be sent, and what was: lists of names; those with a capital are urgent."""

    def __init__(self, patience_s: float = LONG_S) -> None:
        self.sender = BatchSender(self.send_next, self.how_soon)
        self.sent: list[str] = []
        self.num_taken_in = 0
        self._left = ""
        self._patience_s = patience_s
        self.answer = asyncio.Event()

    def put(self, name: str) -> None:
        self._left += name
        self.sender.wake()

    def how_soon(self) -> float | None:
        if not self._left:
            return None
        return self._patience_s if self._left.islower() else 0

    def send_next(self):
        self.sent.append(self._left)
        self._left = ""
        return self.take_in

    async def take_in(self) -> None:
        await self.answer.wait()
        self.num_taken_in += 1


async def rest() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_is_not_urgent_goes_along_with_what_is():
    things = Things()
    things.put("a")
    await rest()
    assert things.sent == []
    things.put("b")
    things.put("C")
    things.put("d")
    await rest()
    assert things.sent == ["abCd"]


async def test_what_is_not_urgent_leaves_when_its_time_is_up():
    things = Things(patience_s=0.01)
    started_s = time.monotonic()
    things.put("a")
    await rest()
    things.put("b")
    while not things.sent:
        await asyncio.sleep(0.001)
    assert things.sent == ["ab"]
    assert time.monotonic() - started_s >= 0.01


async def test_while_one_is_on_its_way_the_next_one_gathers():
    things = Things()
    for name in "ABC":
        things.put(name)
        await rest()
    assert things.sent == ["A"]
    things.answer.set()
    await rest()
    assert things.sent == ["A", "BC"]
    assert things.num_taken_in == 2
    things.put("D")
    await rest()
    assert things.sent == ["A", "BC", "D"]


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("names", ["a", "A", "Aa"])
def test_the_end_of_the_loop_sends_what_is_left(names, num_turns):
    async def put() -> Things:
        things = Things()
        for name in names:
            things.put(name)
            for _ in range(num_turns):
                await asyncio.sleep(0)
        return things

    assert "".join(asyncio.run(put()).sent) == names
