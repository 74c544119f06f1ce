"""What a response tells of its prompt's tokens; pure, because routers learn from it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where the tokens of one prompt came from; the four sum to `prompt_tokens`."""

    prompt_tokens: int
    device: int
    host: int
    shared: int
    computed: int

    @property
    def cached(self) -> int:
        """Prompt tokens whose prefill was skipped."""
        return self.device + self.host + self.shared
