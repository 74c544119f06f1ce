"""Prompt look-up: what is drafted, and when nothing is."""

from hypothesis import given
from hypothesis import strategies as st

from actors.engines.torch.ngram import PromptLookup


def test_what_followed_the_last_tokens_is_drafted() -> None:
    lookup = PromptLookup(3, [1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert lookup.draft(2) == [4, 5]


def test_the_longest_match_wins_over_a_more_recent_one() -> None:
    lookup = PromptLookup(3, [1, 2, 3, 7, 0, 2, 3, 8, 0, 1, 2, 3])
    assert lookup.draft(1) == [7]


def test_the_most_recent_of_equal_matches_wins() -> None:
    lookup = PromptLookup(2, [1, 2, 7, 1, 2, 8, 1, 2])
    assert lookup.draft(1) == [8]


def test_a_repetition_is_continued_beyond_the_end() -> None:
    lookup = PromptLookup(2, [5, 6, 7, 5, 6, 7, 5, 6])
    assert lookup.draft(7) == [7, 5, 6, 7, 5, 6, 7]


def test_a_single_token_is_no_match_unless_asked_for() -> None:
    assert PromptLookup(3, [1, 2, 3, 1]).draft(2) == []
    assert PromptLookup(1, [1, 2, 3, 1]).draft(2) == [2, 3]


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    max_len=st.integers(1, 6),
)
def test_growing_step_by_step_drafts_the_same(
    tokens: list[int], cuts: list[int], max_len: int
) -> None:
    at_once, grown = PromptLookup(3, tokens), PromptLookup(3)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(tokens)], strict=True):
        grown.extend(tokens[start:end])
    assert grown.draft(max_len) == at_once.draft(max_len) == reference(tokens, max_len)


def reference(tokens: list[int], max_len: int) -> list[int]:
    """The definition, by search."""
    for size in (3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) >= size and tokens[end - size : end] == tokens[-size:]:
                known = list(tokens)
                for i in range(max_len):
                    known.append(known[end + i])
                return known[len(tokens) :]
    return []
