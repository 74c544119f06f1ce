"""What the connector answered for the prompts asked last, for an engine that runs beside it.

TensorRT-LLM tells its users how many tokens of a prompt it did not compute, but not which of them
the connector loaded; only the match call sees both numbers. A receipt that guessed would teach the
router wrong.
"""

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from shared_cache.hashing import BlockHash, BlockHashChain

MAX_PROMPTS = 4096
"""Answers that are kept until somebody takes them; older ones are forgotten."""

_Key = tuple[BlockHash, int]


@dataclass(frozen=True, slots=True)
class Matched:
    """One prompt's tokens that were on the device, and those promised beyond them; and when."""

    device_tokens: int
    loaded_tokens: int
    at_s: float = field(default_factory=time.monotonic, compare=False)


class MatchLog:
    """Answers by prompt, each taken once; of equal prompts the oldest one first. Thread-safe.

    Prompts are known by their full blocks and their length; those without a full block, which
    nobody can match, are not kept.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._lock = threading.Lock()
        self._answers: OrderedDict[_Key, deque[Matched]] = OrderedDict()
        self._num_answers = 0

    def note(self, chain: BlockHashChain, matched: Matched) -> None:
        """Keep the answer for the prompt that `chain` holds, and nothing but that prompt."""
        key = _key(chain)
        if key is None:
            return
        with self._lock:
            self._answers.setdefault(key, deque()).append(matched)
            self._num_answers += 1
            while self._num_answers > self._max_prompts:
                self._drop(next(iter(self._answers)))

    def take(self, chain: BlockHashChain, since_s: float) -> Matched | None:
        """The oldest answer for this prompt from `since_s` on; None when there is none.

        Those before are forgotten: they were for requests that ended without a token.
        """
        key = _key(chain)
        with self._lock:
            while key is not None and key in self._answers:
                matched = self._drop(key)
                if matched.at_s >= since_s:
                    return matched
            return None

    def _drop(self, key: _Key) -> Matched:
        answers = self._answers[key]
        matched = answers.popleft()
        self._num_answers -= 1
        if not answers:
            del self._answers[key]
        return matched


def _key(chain: BlockHashChain) -> _Key | None:
    return (chain.hashes[-1], chain.num_tokens) if chain.hashes else None
