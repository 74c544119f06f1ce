"""Estimates that are learned while the program runs: of links, of an engine, of anything timed.

Samples of a shared machine are dirty: a stalled read, a turn beside another process. Means and
plain least squares follow one such sample for minutes, and a cost gate on top of them would shun a
fast tier. So everything here is a median or fits like one, forgets by age, and never says that more
work takes less time. Pure; not thread-safe.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLES_PER_KIND = 12
"""Kept of each kind of work: enough for a median to ignore the odd one, few enough to follow."""

HALF_LIFE_SAMPLES = 12
HALF_LIFE_S = 30.0
"""A sample counts half after so many newer ones, and half after so many seconds; but time alone
takes no more than that half, or the first sample after an idle time would outvote all others."""

_MIN_WEIGHT = 1e-6
_NUM_ROUNDS = 8
_RIDGE = 1e-6
_TINY = 1e-30
_EXACT = 1e-3
"""Residuals below this share of a prediction count as none."""


class RecentMedian:
    """The median of the last samples."""

    def __init__(self, num_samples: int = 15) -> None:
        self._samples: deque[float] = deque(maxlen=num_samples)
        self._median: float | None = None

    @property
    def value(self) -> float | None:
        """The median; None before the first sample."""
        if self._median is None and self._samples:
            self._median = statistics.median(self._samples)
        return self._median

    def add(self, sample: float) -> None:
        """Take a sample; the oldest one may go."""
        self._samples.append(sample)
        self._median = None


@dataclass(frozen=True, slots=True)
class _Sample:
    features: tuple[float, ...]
    seconds: float
    number: int
    taken_s: float


class TimeFit:
    """Seconds as a sum of non-negative costs, one for each feature of the work that took them.

    Least absolute relative deviations: half of the weight of recent samples lies above the fit,
    half below, whatever the outliers. Each kind of work keeps its last samples, so that many small
    jobs do not push out what is known of long ones. What the samples leave open (features that
    never differ) is shared evenly between the features.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._kinds: dict[int, deque[_Sample]] = {}
        self._costs: tuple[float, ...] = ()
        self._is_stale = False

    def add(self, size: float, features: Sequence[float], seconds: float, now_s: float) -> None:
        """Take a sample; `features` are not negative, and as many each time.

        Work is of one kind where `size` is alike up to a factor of four.
        """
        if not seconds > 0 or not math.isfinite(seconds):
            return
        self.num_samples += 1
        kind = math.frexp(size)[1] // 2
        samples = self._kinds.setdefault(kind, deque(maxlen=SAMPLES_PER_KIND))
        samples.append(_Sample(tuple(features), seconds, self.num_samples, now_s))
        self._is_stale = True

    def refit(self) -> None:
        """Learn from the samples that came since; takes about a millisecond if there are any."""
        if self._is_stale:
            self._is_stale = False
            self._costs = _fitted(self._weighed())

    def seconds(self, features: Sequence[float]) -> float:
        """What work with these features is predicted to take, as of `refit`; 0.0 before."""
        return sum(map(_times, self._costs, features))

    def _weighed(self) -> list[tuple[_Sample, float]]:
        samples = [sample for kind in self._kinds.values() for sample in kind]
        newest_s = max(sample.taken_s for sample in samples)
        return [
            (sample, max(_MIN_WEIGHT, 0.5 ** self._age(sample, newest_s))) for sample in samples
        ]

    def _age(self, sample: _Sample, newest_s: float) -> float:
        by_count = (self.num_samples - sample.number) / HALF_LIFE_SAMPLES
        return by_count + min(1.0, (newest_s - sample.taken_s) / HALF_LIFE_S)


def _fitted(samples: Sequence[tuple[_Sample, float]]) -> tuple[float, ...]:
    """The costs; by least squares whose weights make them least absolute deviations."""
    num = len(samples[0][0].features)
    scales = [max(_TINY, *(sample.features[i] for sample, _ in samples)) for i in range(num)]
    rows = [
        (tuple(sample.features[i] / scales[i] for i in range(num)), sample.seconds, weight)
        for sample, weight in samples
    ]
    predicted = [seconds for _, seconds, _ in rows]
    residuals = predicted
    costs: tuple[float, ...] = ()
    for _ in range(_NUM_ROUNDS):
        weights = [
            row[2] / (was * max(residual, _EXACT * was))
            for row, was, residual in zip(rows, predicted, residuals, strict=True)
        ]
        costs = _least_squares([(row[0], row[1]) for row in rows], weights)
        predicted = [max(sum(map(_times, costs, row[0])), 1e-12) for row in rows]
        residuals = [abs(row[1] - now) for row, now in zip(rows, predicted, strict=True)]
    return tuple(cost / scale for cost, scale in zip(costs, scales, strict=True))


def _least_squares(
    rows: Sequence[tuple[tuple[float, ...], float]], weights: Sequence[float]
) -> tuple[float, ...]:
    """The non-negative costs with the least weighted squares; tries which of them are zero."""
    num = len(rows[0][0])
    matrix = [[0.0] * num for _ in range(num)]
    right = [0.0] * num
    for (features, seconds), weight in zip(rows, weights, strict=True):
        for i, feature in enumerate(features):
            weighted = weight * feature
            right[i] += weighted * seconds
            row = matrix[i]
            for j in range(i, num):
                row[j] += weighted * features[j]
    ridge = _RIDGE * max(matrix[i][i] for i in range(num))
    for i in range(num):
        matrix[i][i] += ridge
        for j in range(i):
            matrix[i][j] = matrix[j][i]
    best, best_gain = (0.0,) * num, 0.0
    for size in range(num, 0, -1):
        for used in itertools.combinations(range(num), size):
            costs = _solved([[matrix[i][j] for j in used] for i in used], [right[i] for i in used])
            # With the normal equations solved, what a set of costs explains is `costs . right`.
            gain = sum(cost * right[i] for cost, i in zip(costs, used, strict=True))
            if min(costs) >= 0 and gain > best_gain:
                by_index = dict(zip(used, costs, strict=True))
                best, best_gain = tuple(by_index.get(i, 0.0) for i in range(num)), gain
        if size == num and best_gain:
            return best  # nothing needs to be zero
    return best


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss: the solution of a small symmetric positive system; both arguments are used up."""
    num = len(right)
    for i in range(num):
        for j in range(i + 1, num):
            factor = matrix[j][i] / matrix[i][i]
            right[j] -= factor * right[i]
            for k in range(i, num):
                matrix[j][k] -= factor * matrix[i][k]
    for i in reversed(range(num)):
        known = sum(matrix[i][k] * right[k] for k in range(i + 1, num))
        right[i] = (right[i] - known) / matrix[i][i]
    return right


def _times(left: float, right: float) -> float:
    return left * right


class LinkEstimate:
    """How long reads of one tier take: latency, bytes, and bytes that share the link with others.

    A link that all reads share shows as cost per byte and read in flight, one that gives every read
    its own bandwidth as cost per byte alone; most are between the two.
    """

    MIN_SAMPLES = 4
    """The first reads open connections and fill caches; they alone say little."""

    def __init__(self) -> None:
        self._fit = TimeFit()

    @property
    def num_samples(self) -> int:
        """Reads so far."""
        return self._fit.num_samples

    @property
    def is_known(self) -> bool:
        """Whether there are enough samples to predict."""
        return self._fit.num_samples >= self.MIN_SAMPLES

    def refit(self) -> None:
        """See `TimeFit.refit`."""
        self._fit.refit()

    def add(self, num_bytes: int, num_in_flight: float, seconds: float, now_s: float) -> None:
        """A read among `num_in_flight`, itself counted."""
        shared_bytes = num_bytes * max(1.0, num_in_flight)
        self._fit.add(shared_bytes, (1.0, num_bytes, shared_bytes), seconds, now_s)

    def seconds(self, num_bytes: int, num_in_flight: float = 1.0) -> float:
        """What one read among `num_in_flight` is predicted to take."""
        return self._fit.seconds((1.0, num_bytes, num_bytes * max(1.0, num_in_flight)))


Span = tuple[int, int]
"""Tokens of one request in a turn: (those before, whose KV is valid; those computed now)."""


class PrefillEstimate:
    """How long an engine computes prompts: per token, per pair of tokens (attention), per turn.

    A prompt goes in turns as long as the longest one that was ever seen: to predict longer ones
    would be to guess. So a prompt may look dearer than it is until a long one was computed, and is
    then loaded, which is what one does without a gate.
    """

    MIN_SAMPLES = 3

    def __init__(self) -> None:
        self._fit = TimeFit()
        self._longest_turn = 1

    @property
    def is_known(self) -> bool:
        """Whether there are enough samples to predict."""
        return self._fit.num_samples >= self.MIN_SAMPLES

    @property
    def tokens_per_s(self) -> float:
        """At the beginning of a prompt, in turns as long as the longest so far."""
        return self._longest_turn / max(self.seconds(0, self._longest_turn), 1e-12)

    def refit(self) -> None:
        """See `TimeFit.refit`."""
        self._fit.refit()

    def add(self, spans: Sequence[Span], seconds: float, now_s: float) -> None:
        """A turn that computed these spans of prompts and nothing else."""
        num_new = sum(num_new for _, num_new in spans)
        self._longest_turn = max(self._longest_turn, num_new)
        self._fit.add(num_new, _work(spans, 1), seconds, now_s)

    def turn_seconds(self, spans: Sequence[Span]) -> float:
        """What one turn with these spans is predicted to take."""
        return self._fit.seconds(_work(spans, 1))

    def seconds(self, num_past: int, num_new: int) -> float:
        """What `num_new` tokens behind `num_past` are predicted to take, in as many turns."""
        num_turns = -(-num_new // self._longest_turn)
        return self._fit.seconds(_work([(num_past, num_new)], num_turns))


def _work(spans: Sequence[Span], num_turns: int) -> tuple[float, float, float]:
    num_tokens = sum(num_new for _, num_new in spans)
    num_pairs = sum(num_new * (num_past + num_new / 2) for num_past, num_new in spans)
    return float(num_tokens), num_pairs, float(num_turns)
