"""OpenAI's requests: what is honoured is checked here, and what is not honoured is refused.

A parameter that is dropped in silence gives an answer that the caller did not ask for. So unknown
ones are errors, and of those that are known elsewhere only the values that change nothing pass:
clients send many of them, and null for every one that they leave to the server.
"""

from typing import Annotated, Any, Literal

from openai.types.chat import ChatCompletionFunctionToolParam
from pydantic import BeforeValidator, Field, model_validator

from actors.engine import SamplingParams
from cluster.endpoint.messages import Body, EmptyList, Message

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""

MAX_PROMPTS = 64
MAX_N = 16
MAX_CHOICES = 128
"""Prompts times `n`: each choice is a sequence of its own in an engine."""

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
EmptyMap = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(Body):
    """The parameters that both endpoints honour, and neutral values of others.

    `top_k`, `ignore_eos` and `cache_salt` are extensions that other servers have too: requests
    share cached blocks only with those of the same salt. What `user` and its kin say changes no
    answer by definition.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    cache_salt: str | None = Field(None, min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

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
    def num_logprobs(self) -> int | None:
        """Likeliest tokens that are wanted for each place; None: no log-probabilities at all."""
        return None

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How tokens are chosen, with this limit; those of the first choice."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop for stop in self.stop if stop),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=5)

    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @model_validator(mode="after")
    def _no_more_than_can_be_served(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: this parameter is not supported, unless it equals n")
        num_choices = self.n * len(self.prompts)
        if num_choices > MAX_CHOICES:
            raise ValueError(f"n times prompts is {num_choices}; at most {MAX_CHOICES} choices")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `_Request.num_logprobs`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each of which gets a choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextFormat(Body):
    """The answer's format: none but plain text."""

    type: Literal["text"]


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: list[ChatCompletionFunctionToolParam] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto"] = "auto"
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] = Field(default_factory=list)
    parallel_tool_calls: bool = True
    functions: EmptyList = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    verbosity: Literal["medium"] = "medium"
    web_search_options: None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `_Request.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """The output limit, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The tools that the template tells the model of; none when it shall call none."""
        return [] if self.tool_choice == "none" else [dict(tool) for tool in self.tools]


class TokenizeRequest(Body):
    """The body of `POST /tokenize`: a prompt, or a conversation as the model would get it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list)
    tools: list[ChatCompletionFunctionToolParam] = Field(default_factory=list, max_length=128)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=1 << 20)
