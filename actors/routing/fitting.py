"""A line through measurements that arrive one at a time, beginning from what is believed before.

Least squares over what is remembered: sums that fade, solved anew. (The recursive form, which
keeps the inverse instead, loses its symmetry to rounding and blows up after some ten thousand
measurements.) Few measurements of one kind (every prompt of the same length) do not tell the
parameters apart; then what was believed before decides how they share the change.
"""

from collections.abc import Sequence

SOLVE_EVERY = 8
"""Measurements from one solution to the next, when there were many."""


class RunningFit:
    """The coefficients k of y = sum(k * x), all of them at least 0.

    `prior` are the coefficients before the first measurement, believed to within their own size
    times `doubt`. A measurement counts half after about 0.7 times `memory` others.
    """

    def __init__(self, prior: Sequence[float], doubt: float = 1000.0, memory: int = 2000) -> None:
        size = len(prior)
        self._scale = list(prior)
        self._belief = 1 / doubt**2
        self._keep = 1 - 1 / memory
        self._squares = [[0.0] * size for _ in range(size)]  # of x in units of the prior
        self._products = [0.0] * size
        self._num_measured = 0
        self.coefficients = tuple(prior)

    def predict(self, xs: Sequence[float]) -> float:
        """What y should be for these."""
        return _dot(self.coefficients, xs)

    def learn(self, xs: Sequence[float], y: float, noise: float) -> None:
        """Move the coefficients towards a measurement whose error is about `noise` (above 0)."""
        scaled = [x * scale / noise for x, scale in zip(xs, self._scale, strict=True)]
        target, keep = y / noise, self._keep
        for row, x in zip(self._squares, scaled, strict=True):
            for column, other in enumerate(scaled):
                row[column] = row[column] * keep + x * other
        self._products = [
            old * keep + x * target for old, x in zip(self._products, scaled, strict=True)
        ]
        self._num_measured += 1
        if self._num_measured < 100 or self._num_measured % SOLVE_EVERY == 0:
            values = self._solve()
            self.coefficients = tuple(
                max(0.0, value) * scale for value, scale in zip(values, self._scale, strict=True)
            )

    def _solve(self) -> list[float]:
        """The minimum of squared errors and of the distance from 1, by elimination.

        The matrix is positive definite, so that no pivot is 0 and none need be searched for.
        """
        size = range(len(self._scale))
        rows = [[*self._squares[one], self._products[one] + self._belief] for one in size]
        for one in size:
            rows[one][one] += self._belief
        for one in size:
            for below in range(one + 1, len(rows)):
                share = rows[below][one] / rows[one][one]
                rows[below] = [a - share * b for a, b in zip(rows[below], rows[one], strict=True)]
        values = [0.0] * len(rows)
        for one in reversed(size):
            rest = rows[one][-1] - _dot(rows[one][one + 1 : -1], values[one + 1 :])
            values[one] = rest / rows[one][one]
        return values


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
