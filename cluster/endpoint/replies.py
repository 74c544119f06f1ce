"""OpenAI's responses as plain data: our chunks in, OpenAI's objects out.

No Ray and no web framework here, so that every mapping is tested by itself. Whole answers are made
of OpenAI's own types. The events of a stream, of which there are many, are plain dictionaries; that
they are what OpenAI's types describe, and nothing more, is shown by the tests.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs as CompletionLogprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from actors.dispatch import RoutedChunk
from actors.engine import FinishReason, Receipt
from cluster.endpoint.logprobs import Logprobs

OpenAIReason = Literal["stop", "length"]
RECEIPT_HEADER = "x-kvcommons-receipt"
Made = TypeVar("Made", bound=BaseModel)
TIERS = ("device", "host", "shared", "computed")


@dataclass(slots=True)
class Choice:
    """What has come out for one choice. `num_chars` counts the characters of all its tokens."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    num_chars: int = 0
    num_tokens: int = 0
    num_accepted: int = 0
    finish_reason: OpenAIReason | None = None
    receipt: Receipt | None = None
    replica_id: str = ""
    num_failovers: int = 0
    ttft_s: float | None = None
    predicted_ttft_s: float | None = None

    def add(self, routed: RoutedChunk) -> None:
        """Take a chunk in."""
        chunk = routed.chunk
        self.texts.append(chunk.text)
        self.num_tokens += len(chunk.token_ids)
        self.num_accepted += chunk.num_accepted
        self.finish_reason = openai_reason(chunk.finish_reason) or self.finish_reason
        self.replica_id = routed.replica_id
        self.num_failovers = routed.num_failovers
        if chunk.receipt is not None and self.receipt is None:
            self.receipt = chunk.receipt
            self.ttft_s, self.predicted_ttft_s = routed.ttft_s, routed.predicted_ttft_s

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Reply:
    """The frame of all objects of one response. `num_choices` is the `n` of each prompt."""

    model: str
    response_id: str
    created: int
    num_choices: int = 1

    @property
    def is_chat(self) -> bool:
        """Whether it answers a conversation."""
        return self.response_id.startswith("chatcmpl")

    @classmethod
    def new(cls, prefix: str, model: str, num_choices: int = 1) -> "Reply":
        """A frame with a new id, which begins with `prefix`."""
        return cls(model, f"{prefix}-{uuid.uuid4().hex}", int(time.time()), num_choices)

    def completion(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of `/v1/completions`."""
        body = Completion(
            id=self.response_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=one.text,
                    finish_reason=one.finish_reason or "stop",
                    logprobs=_made(CompletionLogprobs, one),
                )
                for index, one in enumerate(choices)
            ],
            usage=self.usage(choices),
        )
        return _dump(body) | self.extension(choices)

    def chat(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of `/v1/chat/completions`."""
        body = ChatCompletion(
            id=self.response_id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatCompletionMessage(role="assistant", content=one.text),
                    finish_reason=one.finish_reason or "stop",
                    logprobs=_made(ChoiceLogprobs, one),
                )
                for index, one in enumerate(choices)
            ],
            usage=self.usage(choices),
        )
        return _dump(body) | self.extension(choices)

    def completion_chunk(
        self, index: int, text: str, reason: OpenAIReason | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        """One event of a completion stream."""
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return self._event("text_completion", [choice])

    def chat_chunk(
        self, index: int, text: str, reason: OpenAIReason | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        """One event of a chat stream."""
        delta = {"content": text} if text else {}
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return self._event("chat.completion.chunk", [choice])

    def chat_start(self, index: int) -> dict[str, Any]:
        """The first event of a choice of a chat stream: who speaks."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
        return self._event("chat.completion.chunk", [choice])

    def completion_usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a completion stream that includes usage."""
        return self._usage_event("text_completion", choices)

    def chat_usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a chat stream that includes usage."""
        return self._usage_event("chat.completion.chunk", choices)

    def usage(self, choices: Sequence[Choice]) -> CompletionUsage:
        """Tokens in, each prompt counted once, and out; `cached_tokens` is what was not computed.

        The choices of one prompt after the first find it computed, which is not counted.
        """
        receipts = self._receipts(choices)
        prompt = sum(receipt.prompt_tokens for receipt in receipts)
        completion = sum(one.num_tokens for one in choices)
        cached = sum(receipt.cached for receipt in receipts)
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=sum(one.num_accepted for one in choices)
            ),
        )

    def extension(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Our own field, the receipt: prompt tokens by tier, who answered, and how soon.

        The tokens are summed over the prompts; all else is of the first choice.
        """
        receipts, first = self._receipts(choices), choices[0]
        return {
            "kvcommons": {
                **{tier: sum(getattr(one, tier) for one in receipts) for tier in TIERS},
                "replica": first.replica_id,
                "ttft_ms": _ms(first.ttft_s),
                "predicted_ttft_ms": _ms(first.predicted_ttft_s),
                "failovers": sum(one.num_failovers for one in choices),
            }
        }

    def receipt_header(self, choices: Sequence[Choice]) -> dict[str, str]:
        """The receipt as a header, a structured field (RFC 9651): what is known of it by now."""
        fields = self.extension(choices)["kvcommons"]
        del fields["failovers"]
        items = ((key.replace("_", "-"), value) for key, value in fields.items())
        text = ", ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
            for key, value in items
            if value is not None
        )
        return {RECEIPT_HEADER: text}

    def _receipts(self, choices: Sequence[Choice]) -> list[Receipt]:
        firsts = choices[:: self.num_choices]
        return [one.receipt for one in firsts if one.receipt is not None]

    def _event(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage_event(self, kind: str, choices: Sequence[Choice]) -> dict[str, Any]:
        usage = self.usage(choices).model_dump(exclude_unset=True)
        return self._event(kind, []) | {"usage": usage} | self.extension(choices)


def models(name: str, created: int, max_total_tokens: int | None = None) -> dict[str, Any]:
    """The answer of `GET /v1/models`."""
    return {"object": "list", "data": [model(name, created, max_total_tokens)]}


def model(name: str, created: int, max_total_tokens: int | None = None) -> dict[str, Any]:
    """The answer of `GET /v1/models/{name}`; `max_model_len` is an extension others have too."""
    body = _dump(Model(id=name, created=created, object="model", owned_by="kvcommons"))
    return body if max_total_tokens is None else {**body, "max_model_len": max_total_tokens}


def openai_reason(reason: FinishReason | None) -> OpenAIReason | None:
    """The finish reason in OpenAI's words."""
    return None if reason is None else "length" if reason == "length" else "stop"


def _made(kind: type[Made], choice: Choice) -> Made | None:
    merged = Logprobs.merged(choice.logprobs)
    return None if merged is None else kind.model_validate(merged)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _dump(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(mode="json", exclude_unset=True, warnings=False)
