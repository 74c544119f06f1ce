"""How fast this cluster is, measured as it serves: prefill, links, slow-down by decodes.

Typed-in speeds are wrong on the next machine, and a wrong prefill time sends prompts to the wrong
replica (10 % of error costs up to 16 % of the time to first token). The defaults hold until there
are measurements.
"""

from dataclasses import dataclass
from typing import NamedTuple

from actors.routing.fitting import RunningFit

NOISE = 0.1
"""Measured times are off by such a part, and by `NOISE_S` seconds."""
NOISE_S = 2e-3
MEAN_OF = 200
"""Requests that the means of streams, outputs and prefills look back at."""


class Speeds(NamedTuple):
    """What one replica needs, in seconds; the defaults are an H100 with an 8B model.

    Prefill of m tokens after c cached ones: `prefill_base_s + prefill_token_s * m +
    prefill_pair_s * (m * c + m * m / 2)`. Loading one token's KV from host memory or from the
    shared tier takes `host_token_s` or `store_token_s`. Each KV token of running requests slows
    prefill by the part `decode_slowdown`. `overhead_s` is what every request waits besides.
    `stream_s` is the mean time from the first token to the end, `output_tokens` the mean output,
    `work_s` the mean prefill of a request.
    """

    prefill_base_s: float = 6e-3
    prefill_token_s: float = 32e-6
    prefill_pair_s: float = 1.31e-9
    host_token_s: float = 131072 / 40e9
    store_token_s: float = 131072 / 10e9
    decode_slowdown: float = 52e-9 / 65.5e-3
    overhead_s: float = 0.0
    stream_s: float = 10.0
    output_tokens: float = 256.0
    work_s: float = 0.5

    def prefill_s(self, num_tokens: int, cached_tokens: int) -> float:
        """Seconds to compute `num_tokens` after `cached_tokens`, on an idle replica."""
        pairs = num_tokens * (cached_tokens + num_tokens / 2)
        return self.prefill_base_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a first token tells: the receipt's tokens, and times.

    `prefill_s` is the engine's own figure, None when it gives none. `service_s` is from when
    nothing was before the request on its replica until its first token; with its loads, if nothing
    was before it when it came (`is_alone`). `running_kv_tokens` were being decoded meanwhile.
    """

    service_s: float
    computed_tokens: int
    cached_tokens: int
    host_tokens: int = 0
    shared_tokens: int = 0
    running_kv_tokens: int = 0
    prefill_s: float | None = None
    is_alone: bool = False


class MeasuredSpeeds:
    """The speeds of a cluster, corrected by each report; deterministic, reads no clock."""

    def __init__(self, defaults: Speeds | None = None) -> None:
        self.speeds = first = defaults or Speeds()
        self._prefill = RunningFit(
            (
                first.prefill_base_s,
                first.prefill_token_s,
                first.prefill_pair_s,
                first.prefill_token_s * first.decode_slowdown,
            )
        )
        self._loads = RunningFit((NOISE_S, first.host_token_s, first.store_token_s))
        self.num_measured = 0

    def first_token(self, seen: FirstToken) -> None:
        """Learn from a first token."""
        if seen.service_s < 0 or (seen.prefill_s is not None and seen.prefill_s < 0):
            return
        self._learn_prefill(seen)
        self._learn_loads(seen)
        base_s, token_s, pair_s, slowed_s = self._prefill.coefficients
        overhead_s, host_s, store_s = self._loads.coefficients
        self.num_measured += 1
        before = self.speeds
        work_s = before.prefill_s(seen.computed_tokens, seen.cached_tokens)
        self.speeds = before._replace(
            prefill_base_s=base_s,
            prefill_token_s=token_s,
            prefill_pair_s=pair_s,
            host_token_s=host_s,
            store_token_s=store_s,
            decode_slowdown=slowed_s / token_s if token_s else before.decode_slowdown,
            overhead_s=overhead_s,
            work_s=self._mean(before.work_s, work_s, self.num_measured),
        )

    def finished(self, stream_s: float, output_tokens: int) -> None:
        """Learn from a request that ran to its end."""
        now, count = self.speeds, self.num_measured
        self.speeds = now._replace(
            stream_s=self._mean(now.stream_s, stream_s, count),
            output_tokens=self._mean(now.output_tokens, output_tokens, count),
        )

    def _learn_prefill(self, seen: FirstToken) -> None:
        """The engine's figure, else the time as the first, when no load may be part of it."""
        num_tokens = seen.computed_tokens
        if seen.prefill_s is not None:
            took_s = seen.prefill_s
        elif seen.is_alone and (seen.host_tokens or seen.shared_tokens):
            return
        else:
            took_s = seen.service_s
        xs = (
            1.0,
            num_tokens,
            num_tokens * (seen.cached_tokens + num_tokens / 2),
            num_tokens * seen.running_kv_tokens,
        )
        self._prefill.learn(xs, took_s, NOISE * took_s + NOISE_S)

    def _learn_loads(self, seen: FirstToken) -> None:
        """What a request that was alone waited besides its prefill."""
        if not seen.is_alone:
            return
        now = self.speeds
        prefill_s = seen.prefill_s
        if prefill_s is None:
            slow = 1 + now.decode_slowdown * seen.running_kv_tokens
            prefill_s = now.prefill_s(seen.computed_tokens, seen.cached_tokens) * slow
        load_s = max(0.0, seen.service_s - prefill_s)
        xs = (1.0, seen.host_tokens, seen.shared_tokens)
        self._loads.learn(xs, load_s, NOISE * seen.service_s + NOISE_S)

    @staticmethod
    def _mean(mean: float, value: float, count: int) -> float:
        return mean + (value - mean) / min(MEAN_OF, max(10, count))
