"""How far predictions were off, per replica, and whether its cache is believed in. Pure.

An index that is wrong (events lost on the way, an engine that does not tell) sends prompts where
nothing is, again and again: worse than knowing nothing. So a replica whose blocks are too often not
there is routed to by its load alone, until its predictions have come true again, or have aged.
"""

from dataclasses import dataclass

DEMOTED_ABOVE = 0.5
RESTORED_BELOW = 0.25
MIN_PREDICTIONS = 8
"""Predictions before anything is concluded from them."""

_WEIGHT = 1 / 8
_HALF_LIFE_S = 60.0
"""A replica that is not asked for what it is believed to have gets another chance after a while."""


@dataclass(frozen=True, slots=True)
class AccuracySnapshot:
    """Predictions of one replica against what came; means weigh the last ones most.

    `missing` is the part of the tokens believed to be on it that were not there (0 to 1),
    `ttft_error_s` the mean distance between real and predicted time to first token in seconds, and
    `ttft_bias_s` how much later than predicted it came.
    """

    missing: float = 0.0
    ttft_error_s: float = 0.0
    ttft_bias_s: float = 0.0
    num_predictions: int = 0
    num_demotions: int = 0
    is_load_only: bool = False


class Accuracy:
    """The predictions of one replica. Time is given, not read."""

    def __init__(self) -> None:
        self._missing = 0.0
        self._missing_at_s = 0.0
        self._num_blocks_predicted = 0
        self._error_s = self._bias_s = 0.0
        self._num_predictions = self._num_demotions = 0
        self._is_load_only = False

    def note_tokens(self, believed: int, found: int, now_s: float) -> None:
        """So many tokens were believed to be on the replica, and so many were found there."""
        if believed <= 0:
            return
        missing = max(0, believed - found) / believed
        before = self._missing_now(now_s)
        self._missing = before + _WEIGHT * (missing - before)
        self._missing_at_s = now_s
        self._num_blocks_predicted += 1
        self.is_load_only(now_s)

    def note_first_token(self, predicted_s: float, real_s: float) -> None:
        """A first token was predicted after so many seconds, and came after so many."""
        self._num_predictions += 1
        weight = max(_WEIGHT, 1 / self._num_predictions)
        off_s = real_s - predicted_s
        self._error_s += weight * (abs(off_s) - self._error_s)
        self._bias_s += weight * (off_s - self._bias_s)

    def is_load_only(self, now_s: float) -> bool:
        """Whether what is believed of this replica's cache is not to be used now."""
        missing = self._missing_now(now_s)
        if self._is_load_only:
            self._is_load_only = missing >= RESTORED_BELOW
        elif missing > DEMOTED_ABOVE and self._num_blocks_predicted >= MIN_PREDICTIONS:
            self._is_load_only = True
            self._num_demotions += 1
        return self._is_load_only

    def snapshot(self, now_s: float) -> AccuracySnapshot:
        """The figures now."""
        return AccuracySnapshot(
            missing=self._missing_now(now_s),
            ttft_error_s=self._error_s,
            ttft_bias_s=self._bias_s,
            num_predictions=self._num_predictions,
            num_demotions=self._num_demotions,
            is_load_only=self.is_load_only(now_s),
        )

    def _missing_now(self, now_s: float) -> float:
        if not self._is_load_only:
            return self._missing
        return float(self._missing * 0.5 ** (max(0.0, now_s - self._missing_at_s) / _HALF_LIFE_S))
