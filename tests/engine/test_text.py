"""Text while it comes out: no half characters, no half stop strings, nothing lost."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actors.engines.text import TextStream
from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

TOKENIZER = make_tokenizer()


def feed(stream: TextStream, tokens: list[int]) -> list[str]:
    texts = []
    for token in tokens:
        texts.append(stream.feed(token))
        if stream.stopped:
            return texts
    return [*texts, stream.finish()]


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    texts = feed(TextStream(TOKENIZER, []), TOKENIZER.encode("a€b"))
    assert texts == ["a", "", "", "€", "b", ""]


@settings(deadline=None)
@given(st.text(max_size=20))
def test_the_parts_are_the_text(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assume(not any(special in text for special in SPECIAL_TOKENS))  # tokens of their own
    assert "".join(feed(TextStream(TOKENIZER, [70, 71]), TOKENIZER.encode(text))) == text


@settings(deadline=None)
@given(st.lists(st.integers(3, 258), max_size=30))
def test_bytes_that_are_no_text_lose_nothing_around_them(tokens: list[int]) -> None:
    hello = TOKENIZER.encode("hello")
    text = "".join(feed(TextStream(TOKENIZER, []), [*hello, *tokens, *hello]))
    assert text.startswith("hello")
    assert text.endswith("hello")


def test_endless_bytes_that_are_no_text_are_not_held_back_for_ever() -> None:
    broken = TOKENIZER.encode("€")[0]
    stream = TextStream(TOKENIZER, [])
    assert any(stream.feed(broken) for _ in range(20))


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, [], stop)
    shown = "".join(feed(stream, TOKENIZER.encode(text)))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if not ends:
        assert shown == text
        assert not stream.stopped
    else:
        completed = text[: ends[0]]
        assert shown == completed[: min(completed.find(s) for s in stop if s in completed)]
        assert stream.stopped


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(TOKENIZER, [], ["END"])
    texts = [stream.feed(token) for token in TOKENIZER.encode("xENxEN")]
    assert texts == ["x", "", "", "ENx", "", ""]
    assert stream.finish() == "EN"


def test_a_space_that_depends_on_the_token_before_is_kept() -> None:
    words = Tokenizer(models.WordLevel({"\u2581hello": 0, "\u2581world": 1}, "\u2581hello"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert TextStream(tokenizer, []).feed(1) == "world"
    stream = TextStream(tokenizer, [0])
    assert [stream.feed(1), stream.feed(0)] == [" world", " hello"]


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER, [])
    assert stream.feed(TOKENIZER.bos_token_id) == ""
    assert stream.feed(TOKENIZER.encode("a")[0]) == "a"


@pytest.mark.parametrize("cut", range(7))
def test_fed_again_the_stream_goes_on_where_it_was(cut: int) -> None:
    tokens = TOKENIZER.encode("a€EbEND")
    first, second = TextStream(TOKENIZER, [], ["END"]), TextStream(TOKENIZER, [], ["END"])
    before = [first.feed(token) for token in tokens[:cut]]
    assert [second.feed(token) for token in tokens[:cut]] == before
    assert feed(second, tokens[cut:]) == feed(first, tokens[cut:])
