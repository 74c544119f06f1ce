"""The connector's answers, kept for the engine beside it: right ones, once, and not for ever."""

import time

from shared_cache.connector.match_log import Matched, MatchLog
from shared_cache.hashing import BlockHashChain, ReuseScope


def chain(num_tokens: int, salt: str | None = None) -> BlockHashChain:
    return BlockHashChain(4, ReuseScope(salt), range(num_tokens))


def test_an_answer_is_taken_once_and_by_its_prompt() -> None:
    log = MatchLog()
    log.note(chain(10), Matched(4, 4))
    for other in (chain(11), chain(9), chain(10, "salt"), chain(3)):
        assert log.take(other, 0.0) is None
    assert log.take(chain(10), 0.0) == Matched(4, 4)
    assert log.take(chain(10), 0.0) is None


def test_equal_prompts_get_their_answers_in_order() -> None:
    log = MatchLog()
    log.note(chain(10), Matched(0, 0))
    log.note(chain(10), Matched(8, 0))
    assert [log.take(chain(10), 0.0) for _ in range(3)] == [Matched(0, 0), Matched(8, 0), None]


def test_the_answer_of_a_request_that_ended_early_is_nobody_s() -> None:
    log = MatchLog()
    log.note(chain(10), Matched(0, 8))
    since_s = time.monotonic()
    log.note(chain(10), Matched(8, 0))
    assert log.take(chain(10), since_s) == Matched(8, 0)
    assert log.take(chain(10), 0.0) is None


def test_answers_that_nobody_takes_do_not_pile_up() -> None:
    log = MatchLog(max_prompts=3)
    log.note(chain(3), Matched(0, 0))  # no full block: not kept
    for num_tokens in range(4, 12):
        log.note(chain(num_tokens), Matched(0, num_tokens))
    kept = [n for n in range(3, 12) if log.take(chain(n), 0.0) is not None]
    assert kept == [9, 10, 11]
