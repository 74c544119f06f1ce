"""A request of the double, and what a connector may see of it.

The match call gets TensorRT-LLM's C++ base object, the other calls its Python subclass: an
attribute that exists on one only, or in a later version only, is missing here too. A connector that
reads it without a default fails in these tests instead of in somebody's engine.
"""

import hashlib
from dataclasses import dataclass, field
from enum import Enum, auto

from tests.trtllm_runtime.oracle import LAYOUT, Trail, next_token

SIZE = LAYOUT.tokens_per_block


class State(Enum):
    """Where a request stands; names as in TensorRT-LLM's `LlmRequestState`."""

    CONTEXT_INIT = auto()
    GENERATION_IN_PROGRESS = auto()
    GENERATION_TO_COMPLETE = auto()
    GENERATION_COMPLETE = auto()
    DISAGG_GENERATION_TRANS_IN_PROGRESS = auto()
    """Parked: it waits for an asynchronous load."""
    DISAGG_CONTEXT_TRANS_IN_PROGRESS = auto()
    """Its blocks are pinned for an asynchronous save."""


@dataclass(slots=True)
class Request:
    """One request, with all that the runtime knows of it.

    `tokens` are those that the device has computed or is computing; the host has seen
    `num_visible` of them. KV is right for the first `num_valid` tokens once all launched passes are
    through. `unhashed_media` begin at a place of the prompt; no C++ attribute tells of them.
    `num_device_tokens` and `num_promised_tokens` are the answers at its allocation.
    """

    request_id: int
    prompt: tuple[int, ...]
    max_new_tokens: int = 1
    end_token: int | None = None
    cache_salt: str | None = None
    lora_task_id: int | None = None
    multimodal_hashes: tuple[tuple[int, ...], ...] | None = None
    unhashed_media: tuple[int, str] | None = None
    is_dummy: bool = False
    is_generation_only: bool = False
    state: State = State.CONTEXT_INIT
    tokens: list[int] = field(default_factory=list)
    trail: Trail = field(init=False)
    num_visible: int = 0
    num_valid: int = 0
    blocks: list[int] | None = None
    num_kv_tokens: int = 0
    fresh_blocks: list[int] = field(default_factory=list)
    num_device_tokens: int = 0
    num_promised_tokens: int = 0
    context_position: int = 0
    chunk_size: int = 0
    num_launched: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.num_visible = len(self.tokens)
        scope = (self.cache_salt, self.lora_task_id, self.multimodal_hashes, self.is_dummy)
        self.trail = Trail(scope, self.tokens, self.unhashed_media)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def context_remaining(self) -> int:
        """Prompt tokens still to compute."""
        return self.prompt_len - self.context_position

    @property
    def generated(self) -> list[int]:
        """The answer as far as the host has seen it."""
        return self.tokens[self.prompt_len : self.num_visible]

    @property
    def max_blocks(self) -> int:
        """Blocks that it may come to need."""
        return -(-(self.prompt_len + self.max_new_tokens) // SIZE)

    def sample(self) -> None:
        """The device computes the next token; the host does not know it yet."""
        token = next_token(self.trail.states[-1])
        self.tokens.append(token)
        self.trail.append(token)

    def show(self, num_tokens: int) -> None:
        """The host sees the first `num_tokens` tokens; ends the request if that is all of it."""
        self.num_visible = num_tokens
        if len(self.generated) >= self.max_new_tokens:
            self.end("length")
        elif self.end_token is not None and self.generated[-1:] == [self.end_token]:
            self.end("stop")

    def end(self, reason: str) -> None:
        """It runs no more."""
        self.finish_reason = self.finish_reason or reason
        self.state = State.GENERATION_COMPLETE

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None


def salt_id_of(cache_salt: str) -> int:
    """A 64-bit number for a salt; TensorRT-LLM makes it in the same form with blake3."""
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class LlmRequestBase:
    """What the match call sees on 1.2: nothing of Python's, and no `cache_salt`."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.request_id = request.request_id
        self.prompt_len = request.prompt_len
        salt = request.cache_salt
        self.cache_salt_id = None if salt is None else salt_id_of(salt)
        self.lora_task_id = request.lora_task_id
        hashes = request.multimodal_hashes
        self.multimodal_hashes = None if hashes is None else [list(one) for one in hashes]
        self.multimodal_positions = None if hashes is None else [0] * len(hashes)
        self.multimodal_lengths = None if hashes is None else [1] * len(hashes)
        self.is_generation_only_request = request.is_generation_only

    def get_tokens(self, beam: int) -> list[int]:
        """A copy of the tokens that the host has seen, as the binding makes one."""
        if beam != 0:
            raise IndexError(f"beam {beam}")
        return self._request.tokens[: self._request.num_visible]

    @property
    def context_current_position(self) -> int:
        """Prompt tokens whose KV is taken for valid."""
        return self._request.context_position

    @property
    def context_remaining_length(self) -> int:
        """Prompt tokens still to compute."""
        return self._request.context_remaining

    @property
    def context_chunk_size(self) -> int:
        """Prompt tokens of the coming forward pass."""
        return self._request.chunk_size

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self._request.is_finished

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._request.state


class LlmRequest(LlmRequestBase):
    """What the other calls see: Python's subclass."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.py_request_id = request.request_id
        self.is_dummy = request.is_dummy
        self.py_multimodal_data: dict[str, object] = {"mrope_config": {}}
        if request.unhashed_media is not None:
            self.py_multimodal_data["image"] = request.unhashed_media[1]


class LaterLlmRequestBase(LlmRequestBase):
    """The same since the salt itself is bound."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.cache_salt = request.cache_salt
