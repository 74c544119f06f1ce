"""OpenAI's requests: what is honoured is checked here, and what is not honoured is refused.

A parameter that is dropped in silence gives an answer that the caller did not ask for. So unknown
ones are errors, and of those that are known elsewhere only the values that change nothing pass:
clients send many of them, and null for every one that they leave to the server.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from actors.engine import SamplingParams
from shared_cache.hashing import ReuseScope

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""

MAX_PROMPTS = 64
MAX_STOPS = 16
"""OpenAI allows 4; some clients send more, and each is looked for in every piece of text."""

MAX_STOP_CHARS = 256


def _at_most_max_prompts(prompt: Any) -> Any:
    is_list = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    if is_list and len(prompt) > MAX_PROMPTS:
        raise ValueError(
            f"at most {MAX_PROMPTS} prompts in one request, not {len(prompt)}; send several ones"
        )
    return prompt


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[str] | list[TokenIds], Field(min_length=1)]
Prompt = Annotated[str | TokenIds | Prompts, BeforeValidator(_at_most_max_prompts)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyMap = Annotated[dict[str, Any], Field(max_length=0)]


class _Body(BaseModel):
    """A JSON object of OpenAI's, where null means that the parameter is not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in values.items() if v is not None or k not in optional}


class StreamOptions(_Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Body):
    """The parameters that both endpoints honour, and neutral values of others.

    `top_k`, `ignore_eos` and `cache_salt` are extensions that other servers have too: requests
    share cached blocks only with those of the same salt. What `user` and its kin say changes no
    answer by definition.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=0)
    ignore_eos: bool = False
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: EmptyMap = Field(default_factory=dict)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _usage_is_for_streams(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def scope(self) -> ReuseScope:
        """Which requests may reuse this one's blocks."""
        return ReuseScope(cache_salt=self.cache_salt)

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How tokens are chosen, with this limit."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop for stop in self.stop if stop),
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    prompt: Prompt

    best_of: Literal[1] = 1
    echo: Literal[False] = False
    logprobs: None = None
    suffix: Literal[""] = ""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each of which gets a choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation; the fields that only answers have may be sent back empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList = Field(default_factory=list)
    annotations: EmptyList = Field(default_factory=list)

    def for_template(self) -> dict[str, str]:
        """The message as chat templates want it."""
        is_text = isinstance(self.content, str)
        text = self.content if is_text else "".join(part.text for part in self.content)  # type: ignore[union-attr]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": str(text)}


class TextFormat(_Body):
    """The answer's format: none but plain text."""

    type: Literal["text"]


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] = Field(default_factory=list)
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    tools: EmptyList = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    functions: EmptyList = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    verbosity: Literal["medium"] = "medium"
    web_search_options: None = None

    @property
    def limit(self) -> int | None:
        """The output limit, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens
