"""Traces of requests: read from a file in Mooncake's format, or generated from a seed.

One JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`,
one number per block of 512 tokens of the prompt; equal leading numbers mean a shared prefix.
"""

import hashlib
import heapq
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from shared_cache.hashing import BlockHash

TOKENS_PER_BLOCK = 512
ROOT = BlockHash(hashlib.sha256(b"trace").digest())


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt. `hashes` names its blocks and all before each; the last one may be cut."""

    timestamp_s: float
    hashes: tuple[BlockHash, ...]
    num_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in order."""
    names = ChainNames()
    requests = []
    with path.open() as lines:
        for line in lines:
            entry = json.loads(line)
            hashes = names.of(entry["hash_ids"])
            tokens = entry["input_length"], entry["output_length"]
            requests.append(TraceRequest(entry["timestamp"] / 1000, hashes, *tokens))
    return requests


class ChainNames:
    """Block hashes of chains of numbers; one object per (parent, number), to save memory."""

    def __init__(self) -> None:
        self._name_of: dict[tuple[BlockHash, int], BlockHash] = {}

    def of(self, numbers: list[int]) -> tuple[BlockHash, ...]:
        hashes, parent = [], ROOT
        for number in numbers:
            name = self._name_of.get((parent, number))
            if name is None:
                name = BlockHash(hashlib.sha256(parent + number.to_bytes(8, "little")).digest())
                self._name_of[parent, number] = name
            hashes.append(name)
            parent = name
        return tuple(hashes)


Event = tuple[float, list[int]]
"""When a prompt comes, in seconds, and the numbers of its blocks."""


class GeneratedTraffic:
    """Chats of several turns, questions about shared documents, agents whose steps branch.

    Lengths and times are drawn so that many prompts come once, some soon again and few for long, as
    in a service open to everybody. `mix` weighs the three kinds. The same seed gives the same
    requests.
    """

    def __init__(
        self,
        seed: int,
        num_sessions: int = 3000,
        hours: float = 1.0,
        mix: tuple[float, float, float] = (6, 3, 1),
    ) -> None:
        self._random = random.Random(seed)
        self._mix = mix
        self._new = count()
        self._num_sessions = num_sessions
        self._span_s = hours * 3600
        self._system_prompts = [self._blocks(3) for _ in range(8)]
        self._documents = [self._blocks(self._random.randint(10, 80)) for _ in range(300)]

    def requests(self) -> list[TraceRequest]:
        names = ChainNames()
        kinds = self._random.choices(
            [self._chat, self._questions, self._agent], self._mix, k=self._num_sessions
        )
        events = heapq.merge(*[kind(self._start()) for kind in kinds], key=lambda e: e[0])
        return [self._request(at_s, names.of(numbers)) for at_s, numbers in events]

    def _request(self, at_s: float, hashes: tuple[BlockHash, ...]) -> TraceRequest:
        """The lengths follow from the blocks, so that they draw nothing from the random numbers."""
        last = int.from_bytes(hashes[-1][:4], "little")
        num_tokens = len(hashes) * TOKENS_PER_BLOCK - last % TOKENS_PER_BLOCK
        output_tokens = 1 + int(-300 * math.log((1 + (last >> 12)) / (1 << 20)))
        return TraceRequest(at_s, hashes, num_tokens, output_tokens)

    def _start(self) -> float:
        return self._random.uniform(0, self._span_s)

    def _blocks(self, num_blocks: int) -> list[int]:
        return [next(self._new) for _ in range(num_blocks)]

    def _pause(self, mean_s: float) -> float:
        return self._random.expovariate(1 / mean_s)

    def _chat(self, at_s: float) -> Iterator[Event]:
        """Each turn is the one before, its answer and a new question."""
        history = list(self._random.choice(self._system_prompts))
        while True:
            history += self._blocks(1 + int(self._random.paretovariate(1.2)) % 60)
            yield at_s, list(history)
            if self._random.random() < 0.4:
                return
            at_s += self._pause(90)

    def _questions(self, at_s: float) -> Iterator[Event]:
        """A few questions about one document; few documents are asked about by many."""
        rank = int(self._random.paretovariate(0.7)) - 1
        document = self._documents[rank % len(self._documents)]
        for _ in range(self._random.randint(1, 3)):
            yield at_s, document + self._blocks(1)
            at_s += self._pause(30)

    def _agent(self, at_s: float) -> Iterator[Event]:
        """Steps that follow each other quickly; now and then one branches off further back."""
        steps = [list(self._system_prompts[0])]
        for _ in range(self._random.randint(5, 30)):
            back = self._random.randint(1, 3) if self._random.random() < 0.15 else 1
            step = steps[max(0, len(steps) - back)] + self._blocks(self._random.randint(1, 4))
            steps.append(step)
            yield at_s, list(step)
            at_s += self._pause(8)
