"""OpenAI's responses as plain data: our chunks in, OpenAI's objects out.

No Ray and no web framework here, so that every mapping is tested by itself. Responses are made of
OpenAI's own types, so a field that they do not have cannot be invented by accident.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChatChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from actors.dispatch import RoutedChunk
from actors.engine import FinishReason, Receipt
from shared_cache.errors import ReplicaUnavailableError, RequestError

OpenAIReason = Literal["stop", "length"]


@dataclass(slots=True)
class Choice:
    """What has come out for one prompt."""

    text: str = ""
    num_tokens: int = 0
    num_accepted: int = 0
    finish_reason: OpenAIReason | None = None
    receipt: Receipt | None = None
    replica_id: str = ""

    def add(self, routed: RoutedChunk) -> None:
        """Take a chunk in."""
        chunk = routed.chunk
        self.text += chunk.text
        self.num_tokens += len(chunk.token_ids)
        self.num_accepted += chunk.num_accepted
        self.finish_reason = _reason(chunk.finish_reason) or self.finish_reason
        self.receipt = self.receipt or chunk.receipt
        self.replica_id = routed.replica_id


@dataclass(frozen=True, slots=True)
class Reply:
    """The frame of all objects of one response."""

    model: str
    response_id: str
    created: int

    @classmethod
    def new(cls, prefix: str, model: str) -> "Reply":
        """A frame with a new id, which begins with `prefix`."""
        return cls(model, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def completion(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of `/v1/completions`."""
        body = Completion(
            id=self.response_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=[_text_choice(i, one.text, one.finish_reason) for i, one in enumerate(choices)],
            usage=usage(choices),
        )
        return _dump(body) | extension(choices)

    def completion_chunk(self, index: int, routed: RoutedChunk) -> dict[str, Any]:
        """One event of a completion stream."""
        chunk = routed.chunk
        return self._completion_event([_text_choice(index, chunk.text, chunk.finish_reason)])

    def completion_usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a completion stream that includes usage."""
        return self._completion_event([]) | _usage_event(choices)

    def chat(self, choice: Choice) -> dict[str, Any]:
        """The answer of `/v1/chat/completions`."""
        message = ChatCompletionMessage(role="assistant", content=choice.text)
        body = ChatCompletion(
            id=self.response_id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=0,
                    message=message,
                    finish_reason=choice.finish_reason or "stop",
                    logprobs=None,
                )
            ],
            usage=usage([choice]),
        )
        return _dump(body) | extension([choice])

    def chat_start(self) -> dict[str, Any]:
        """The first event of a chat stream: who speaks."""
        return self._chat_event([ChoiceDelta(role="assistant", content="")])

    def chat_chunk(self, index: int, routed: RoutedChunk) -> dict[str, Any]:
        """One event of a chat stream; `index` is 0."""
        chunk = routed.chunk
        delta = ChoiceDelta(content=chunk.text) if chunk.text else ChoiceDelta()
        return self._chat_event([delta], _reason(chunk.finish_reason), index)

    def chat_usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a chat stream that includes usage."""
        return self._chat_event([]) | _usage_event(choices)

    def _completion_event(self, choices: list[CompletionChoice]) -> dict[str, Any]:
        return _dump(
            Completion(
                id=self.response_id,
                object="text_completion",
                created=self.created,
                model=self.model,
                choices=choices,
            )
        )

    def _chat_event(
        self, deltas: list[ChoiceDelta], reason: OpenAIReason | None = None, index: int = 0
    ) -> dict[str, Any]:
        choices = [
            ChatChunkChoice(index=index, delta=delta, finish_reason=reason) for delta in deltas
        ]
        return _dump(
            ChatCompletionChunk(
                id=self.response_id,
                object="chat.completion.chunk",
                created=self.created,
                model=self.model,
                choices=choices,
            )
        )


def usage(choices: Sequence[Choice]) -> CompletionUsage:
    """Tokens in and out; `cached_tokens` is what no replica had to compute."""
    receipts = [one.receipt for one in choices if one.receipt is not None]
    prompt = sum(receipt.prompt_tokens for receipt in receipts)
    completion = sum(one.num_tokens for one in choices)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(r.cached for r in receipts)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=sum(one.num_accepted for one in choices)
        ),
    )


def extension(choices: Sequence[Choice]) -> dict[str, Any]:
    """Our own field: tokens by tier over all choices, and the replica that ended the last one."""
    receipts = [one.receipt for one in choices if one.receipt is not None]
    tiers = ("device", "host", "shared", "computed")
    sums = {tier: sum(getattr(receipt, tier) for receipt in receipts) for tier in tiers}
    return {"kvcommons": {**sums, "replica": choices[-1].replica_id}}


def models(name: str, created: int) -> dict[str, Any]:
    """The answer of `GET /v1/models`."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """The answer of `GET /v1/models/{name}`."""
    return _dump(Model(id=name, created=created, object="model", owned_by="kvcommons"))


def unknown_model(asked: str, served: str) -> dict[str, Any]:
    """The body of a 404."""
    return error_body(
        f"the model {asked!r} is not served here; the one that is: {served!r}",
        "invalid_request_error",
        param="model",
        code="model_not_found",
    )


def invalid(errors: Sequence[Any]) -> dict[str, Any]:
    """The body of a 400 for what pydantic found wrong in a request; names the first parameter."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    is_place_in_text = first["type"] == "json_invalid"
    param = None if is_place_in_text or not names else names[0]
    text = "this parameter is not supported" if _is_unsupported(first) else first["msg"]
    message = f"{'.'.join(names) or 'body'}: {text.removeprefix('Value error, ')}"
    return error_body(message, "invalid_request_error", param=param)


def _is_unsupported(error: Any) -> bool:
    """Whether no value, or none but an empty one, would have been accepted."""
    is_only_empty = error["type"] == "too_long" and error["ctx"]["max_length"] == 0
    return is_only_empty or error["type"] in ("extra_forbidden", "none_required")


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for an error of ours; anything else is a 500."""
    if isinstance(error, RequestError):
        return 400, error_body(str(error), "invalid_request_error")
    if isinstance(error, ReplicaUnavailableError):
        return 503, error_body(str(error), "service_unavailable_error")
    return 500, error_body("internal error; the server's log has the details", "server_error")


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _reason(reason: FinishReason | None) -> OpenAIReason | None:
    return None if reason is None else "length" if reason == "length" else "stop"


def _text_choice(index: int, text: str, reason: FinishReason | None) -> CompletionChoice:
    # Constructed unchecked: in a stream the reason is null until the end, which the type denies.
    return CompletionChoice.model_construct(
        index=index,
        text=text,
        finish_reason=_reason(reason),  # type: ignore[arg-type]
        logprobs=None,
    )


def _usage_event(choices: Sequence[Choice]) -> dict[str, Any]:
    return {"usage": usage(choices).model_dump(exclude_unset=True), **extension(choices)}


def _dump(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(mode="json", exclude_unset=True, warnings=False)
