"""A conversation's messages, as clients send them and as chat templates want them.

The two differ: OpenAI's have names that no template knows, parts where a template wants one text,
and the arguments of calls as text where it wants objects. A message that a template reads wrongly
gives another prompt, and no error.
"""

import contextlib
import json
from typing import Annotated, Any, Literal

from openai.types.chat import ChatCompletionMessageFunctionToolCallParam
from pydantic import BaseModel, ConfigDict, Field, model_validator

EmptyList = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    """A JSON object of OpenAI's, where null means that the parameter is not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in values.items() if v is not None or k not in optional}


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation; the fields that only answers have may be sent back empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ChatCompletionMessageFunctionToolCallParam] = Field(default_factory=list)
    tool_call_id: str | None = None

    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: EmptyList = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only a message with tool_calls needs none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are made by the assistant; this message has another role")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it: arguments of calls are objects there, not text."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(),
        }
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(one) for one in self.tool_calls]
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message

    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


def _call_for_template(call: ChatCompletionMessageFunctionToolCallParam) -> dict[str, Any]:
    function = call["function"]
    arguments: Any = function["arguments"]
    # Where the model wrote no JSON, or none that can be read, the template gets what it wrote.
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}
