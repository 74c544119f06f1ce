"""OpenAI's requests: what is honoured is checked here, and what is not honoured is refused.

A parameter that is dropped in silence gives an answer that the caller did not ask for. So unknown
ones are errors, and of those that are known elsewhere only the values that change nothing pass.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engine import SamplingParams

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=64)]
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Request(BaseModel):
    """The parameters that both endpoints honour, and neutral values of others.

    `top_k` and `ignore_eos` are extensions that other servers have too; `user` changes nothing by
    definition.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    top_k: int = Field(0, ge=0)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _usage_is_for_streams(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How tokens are chosen, with this limit."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    prompt: str | TokenIds | Prompts

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each of which gets a choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates want it."""
        is_text = isinstance(self.content, str)
        text = self.content if is_text else "".join(part.text for part in self.content)  # type: ignore[union-attr]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": str(text)}


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """The output limit, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens
