"""Prompts fit whichever model they are made for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import EngineConfig, ModelSource
from cluster.demo.prompts import Prompts, model_max_tokens
from cluster.demo.sizes import MIN_MODEL_TOKENS, fitted_sizes
from shared_cache.errors import ConfigError, ModelError


class WordTokenizer:
    """One token a word or blank; token 0 is a special one that `encode` puts first."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self._ids: dict[str, int] = {"<s>": 0}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        pieces = [piece for word in text.split(" ") for piece in (word, " ")][:-1]
        ids = [self._ids.setdefault(piece, len(self._ids)) for piece in pieces if piece]
        return [0, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        pieces = {index: piece for piece, index in self._ids.items()}
        return "".join(pieces[index] for index in ids if index or not skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Any], **_: object) -> str:
        turns = [f"<{m['role']}> {m['content']} " for m in messages]
        return "<s> " + "".join(turns) + "<assistant> "


@pytest.fixture(params=[None, "a template"])
def prompts(request: pytest.FixtureRequest) -> Prompts:
    return Prompts(WordTokenizer(request.param))


TEXT = " ".join(f"word{n}" for n in range(300))


@given(st.integers(1, 700))
def test_cut_text_is_a_beginning_within_the_limit(num_tokens: int) -> None:
    prompts = Prompts(WordTokenizer(None))
    kept = prompts.cut(TEXT, num_tokens)
    assert TEXT.startswith(kept)
    assert prompts.num_tokens(kept) <= num_tokens
    if num_tokens >= 599:
        assert kept == TEXT


def test_raw_text_is_cut_to_the_token(prompts: Prompts) -> None:
    assert len(prompts.text(TEXT, 37)) == 37
    assert prompts.text(TEXT)[:37] == prompts.text(TEXT, 37)


def test_a_conversation_continues_the_one_before(prompts: Prompts) -> None:
    first = prompts.chat([{"role": "user", "content": TEXT}])
    second = prompts.chat(
        [
            {"role": "user", "content": TEXT},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "and now?"},
        ]
    )
    assert second[: len(first) - 1] == first[:-1]
    assert len(second) > len(first)
    assert first.count(0) == 1


def test_an_answer_can_be_begun_for_the_model(prompts: Prompts) -> None:
    plain = prompts.chat([{"role": "user", "content": "hello"}])
    begun = prompts.chat([{"role": "user", "content": "hello"}], answer_start="Sure, here:")
    assert begun[: len(plain)] == plain
    assert len(begun) > len(plain)


@pytest.mark.parametrize("max_tokens", [20, 100, 5000])
def test_a_question_about_a_text_fits(prompts: Prompts, max_tokens: int) -> None:
    def ask(text: str) -> tuple[int, ...]:
        return prompts.chat([{"role": "user", "content": f"{text} and what now ?"}])

    ids = prompts.about(TEXT, ask, max_tokens)
    assert len(ids) <= max_tokens
    assert len(ids) > min(max_tokens, 600) - 4


def test_a_question_that_can_never_fit_says_what_to_raise(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="max_seq_len"):
        prompts.about(TEXT, lambda text: tuple(range(50)), 20)


def test_limits_come_from_the_model_and_the_settings(tmp_path: Path) -> None:
    model = ModelSource(name="m", path=str(tmp_path), revision="r")
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    assert model_max_tokens(model, EngineConfig()) == 512
    assert model_max_tokens(model, EngineConfig(max_seq_len=300)) == 300
    assert model_max_tokens(model, EngineConfig(max_seq_len=4096)) == 512
    (tmp_path / "config.json").write_text("{}")
    assert model_max_tokens(model, EngineConfig()) == 2048


def test_a_missing_tokenizer_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="tokenizer"):
        Prompts.of_model(ModelSource(name="m", path=str(tmp_path), revision="r"))


@given(st.integers(MIN_MODEL_TOKENS, 10_000), st.sampled_from([4, 16, 32, 64]), st.booleans())
def test_sizes_fit_every_model(max_tokens: int, block: int, quick: bool) -> None:
    sizes = fitted_sizes(max_tokens, block, quick)
    assert sizes.share_prompt_tokens + sizes.share_output_tokens <= max_tokens
    assert sizes.offload.pool_tokens % block == 0
    assert sizes.offload.pool_tokens <= max_tokens
    assert sizes.offload.prompt_tokens > sizes.offload.pool_tokens - block
    assert sizes.edit_output_tokens < max_tokens
    assert sizes.load.request_tokens <= max_tokens
    assert sizes.load.pool_tokens(block) >= sizes.load.request_tokens
    assert sizes.load.pool_tokens(block) % block == 0


def test_the_full_sizes_are_those_of_the_description() -> None:
    sizes = fitted_sizes(8192, 32)
    assert sizes.share_prompt_tokens == 2000
    load = sizes.load
    assert load.num_documents * load.document_tokens > load.pool_tokens(32)


def test_too_short_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_seq_len"):
        fitted_sizes(MIN_MODEL_TOKENS - 1, 32)
