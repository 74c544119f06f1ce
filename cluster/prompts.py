"""Text to tokens, in the ingress: with the model's own tokeniser and chat template.

Tokens, not text, are what is hashed, routed and stored; so they are made once, before routing.
"""

from typing import Any

from shared_cache.errors import RequestError


class PromptEncoder:
    """The tokeniser of the model in `path`; thread-safe."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)

    def text(self, text: str) -> tuple[int, ...]:
        """The tokens of a plain prompt; raises `RequestError` for an empty one."""
        tokens = tuple(self._tokenizer(text)["input_ids"])
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        return tokens

    def chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """The tokens of a conversation, ready for the assistant's answer."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses this: {error}") from error
        return tuple(encoded["input_ids"])
