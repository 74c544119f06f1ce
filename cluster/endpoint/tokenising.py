"""Prompts to tokens on the way in: on threads of its own, and never of a text too long to serve.

Tokenising holds the interpreter for seconds where a text is megabytes long. On the threads that
everything else uses, or before a caller's limits were looked at, a few such texts would hold up
everybody else.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cluster.endpoint.prompts import PromptEncoder
from shared_cache.errors import PromptTooLongError

T = TypeVar("T")

THREADS = 2
SHORT_CHARS = 2000
"""A text that is tokenised sooner than a thread is asked to do it."""


class Tokenising:
    """The encoder of one ingress; a prompt must leave room for output in `max_total_tokens`."""

    def __init__(self, encoder: PromptEncoder, max_total_tokens: int | None) -> None:
        self._encoder = encoder
        self._max_total_tokens = max_total_tokens
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvcommons-tokenise")

    async def prompt(
        self,
        prompt: str | Sequence[int],
        add_special_tokens: bool = True,
        must_fit: bool = True,
    ) -> tuple[int, ...]:
        """The tokens of a plain prompt; raises `RequestError`.

        Also when they leave no room for output, unless they need not (`must_fit`).
        """
        if not isinstance(prompt, str):
            return self._fitting(tuple(prompt), must_fit)
        self._check_chars(len(prompt))
        encode = self._encoder.text
        tokens = await self._done(len(prompt), encode, prompt, add_special_tokens)
        return self._fitting(tokens, must_fit)

    async def chat(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
        must_fit: bool = True,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, ready for the assistant's answer; as `prompt`."""
        num_chars = sum(len(str(one.get("content") or "")) for one in messages)
        self._check_chars(num_chars)
        effort = num_chars if not tools else SHORT_CHARS + 1
        encode = self._encoder.chat
        tokens = await self._done(effort, encode, messages, tools, add_generation_prompt)
        return self._fitting(tokens, must_fit)

    async def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens; raises `RequestError`."""
        return await self._done(len(tokens), self._encoder.decode, tokens)

    async def _done(self, num_chars: int, work: Callable[..., T], *arguments: object) -> T:
        if num_chars <= SHORT_CHARS:
            return work(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)

    def _check_chars(self, num_chars: int) -> None:
        """Refuse a text that cannot be few enough tokens, before it is looked at."""
        if self._max_total_tokens is None:
            return
        longest = self._encoder.longest_token_chars
        if num_chars > self._max_total_tokens * longest:
            raise PromptTooLongError(
                f"the prompt's {num_chars} characters are {num_chars // longest} tokens at least, "
                f"and {self._room}"
            )

    def _fitting(self, tokens: tuple[int, ...], must_fit: bool) -> tuple[int, ...]:
        limit = self._max_total_tokens
        if must_fit and limit is not None and len(tokens) >= limit:
            raise PromptTooLongError(
                f"the prompt's {len(tokens)} tokens leave no room for output: {self._room}"
            )
        return tokens

    @property
    def _room(self) -> str:
        return f"prompt and output together have at most {self._max_total_tokens} here; shorten it"
