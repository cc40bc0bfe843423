"""Where the reward of a run is heading as its entropy falls: R = -a e^H + b, fitted to the run's own steps.

H is the mean token entropy in nats and R the mean reward of a step. The law is that of Cui et al., "The Entropy Mechanism of
Reinforcement Learning for Reasoning Language Models" (arXiv 2505.22617), who fit it to validation accuracy. At H = 0 it gives the
ceiling b - a. It describes one run and explains nothing: a method that changes how entropy is spent leaves it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.estimators import Z95

MIN_STEPS = 30
# of the variance of e^H may come from one step to the next; noise there would flatten the slope as much
MOST_NOISE = 0.1


@dataclass(frozen=True)
class Forecast:
    """R = -a e^H + b after ``n`` steps; ``low`` to ``high`` is the 95 % interval of the ceiling b - a, the reward at H = 0."""

    a: float
    b: float
    ceiling: float
    low: float
    high: float
    r2: float
    n: int


class Line:
    """Least squares of y = intercept + slope x, from sums only, so that a further point costs the same however many there were.

    Residuals may be autocorrelated, as those of a training are: they are taken for AR(1). Its coefficient is that of the residuals,
    corrected for the bias that fitting a trend gives it, and at least 0; every variance is then (1 + r) / (1 - r) times that of independent
    residuals, which is right where x moves slowly, as an entropy does.
    """

    def __init__(self):
        self._origin: tuple[float, float] | None = None  # sums are about the first point, which keeps their digits
        self._last = np.zeros(3)
        # sums of v v' and of v v_before', v = (1, x, y)
        self._square, self._lagged = np.zeros((3, 3)), np.zeros((3, 3))
        self._jumps = 0.0  # sum of squared changes of x
        self._state: tuple | None = None

    def add(self, x: float, y: float) -> None:
        """One more point."""
        if self._origin is None:
            self._origin = (x, y)
        point = np.array([1.0, x - self._origin[0], y - self._origin[1]])
        self._square += np.outer(point, point)
        if self.n > 1:
            self._lagged += np.outer(point, self._last)
            self._jumps += (point[1] - self._last[1]) ** 2
        self._last, self._state = point, None

    @property
    def n(self) -> int:
        return int(self._square[0, 0])

    @property
    def noise(self) -> float:
        """Share of the variance of x that is change from one point to the next: about 1 for noise, near 0 for a slow move."""
        spread = self._spread()
        return float(self._jumps / (2 * spread)) if spread > 0 else 1.0

    @property
    def slope(self) -> float:
        return float(self._solved()[0][1])

    @property
    def r2(self) -> float:
        """Share of the variance of y that the line explains; NaN where y never changed."""
        total = self._square[2, 2] - self._square[0, 2] ** 2 / self.n
        return float(1 - self._solved()[2] / total) if total > 0 else math.nan

    @property
    def correlation(self) -> float:
        """r of the residuals, 0 to 0.95."""
        return self._solved()[3]

    @property
    def deviation(self) -> float:
        """Standard deviation of the residuals, corrected for what the fit takes away."""
        _, _, squares, r = self._solved()
        return math.sqrt(max(squares, 0.0) / max(self.n - 2 * _inflation(r), 1.0))

    def at(self, x: float) -> float:
        """y on the line."""
        (intercept, slope), *_ = self._solved()
        return float(self._origin[1] + intercept + slope * (x - self._origin[0]))

    def error(self, x: float) -> float:
        """Standard error of the line at ``x``."""
        where = np.array([1.0, x - self._origin[0]])
        return self.deviation * math.sqrt(_inflation(self.correlation) * float(where @ self._solved()[1] @ where))

    def slope_error(self) -> float:
        """Standard error of the slope."""
        return self.deviation * math.sqrt(_inflation(self.correlation) * float(self._solved()[1][1, 1]))

    def quantile(self) -> float:
        """So many standard errors to each side hold 95 %: Student's t, for as many points as would say as much if independent."""
        return student(self.n / _inflation(self.correlation) - 2)

    def _spread(self) -> float:
        return float(self._square[1, 1] - self._square[0, 1] ** 2 / self.n) if self.n else 0.0

    def _solved(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Coefficients, inverse of X'X, sum of squared residuals, their correlation."""
        if self._state is None:
            inverse = np.linalg.inv(self._square[:2, :2])
            line = inverse @ self._square[:2, 2]
            take = np.array([-line[0], -line[1], 1.0])  # take @ v is a residual
            squares = float(take @ self._square @ take)
            raw = float(take @ self._lagged @ take) / squares if squares > 0 else 0.0
            r = (raw + 2 / self.n) / (1 - 4 / self.n) if self.n > 4 else 0.0
            self._state = (line, inverse, squares, min(max(r, 0.0), 0.95))
        return self._state


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t by its expansion in 1 / freedom, which is taken for at least 2: within 1 % above 3."""
    v, z = max(freedom, 2.0), Z95
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / v**k for k, term in enumerate(terms, 1))


def _inflation(r: float) -> float:
    return (1 + r) / (1 - r)


def _forecast(line: Line) -> Forecast | None:
    if line.n < MIN_STEPS or line.noise > MOST_NOISE:
        return None
    ceiling, half = line.at(1.0), line.quantile() * line.error(1.0)
    a = -line.slope
    return Forecast(a, ceiling + a, ceiling, ceiling - half, ceiling + half, line.r2, line.n)


def fit(entropy: Sequence[float], reward: Sequence[float]) -> Forecast | None:
    """The forecast after a run's steps; None before 30 of them or while the entropy has hardly moved but for noise.

    Args:
        entropy, reward: one value a step, in nats and in the reward's unit; a step where either is not finite is left out.

    Raises:
        ValueError: not equally many of both.
    """
    line = Line()
    for h, r in zip(entropy, reward, strict=True):
        if _usable(h, r):
            line.add(math.exp(h), r)
    return _forecast(line)


def _usable(entropy: float | None, reward: float | None) -> bool:
    known = entropy is not None and reward is not None and math.isfinite(entropy) and math.isfinite(reward)
    return known and entropy < 50  # no vocabulary has e^50 words


class Online:
    """The forecast of a run under way, and whether its last steps left the law.

    The last ``window`` steps are compared with the law of the first half of the run: the mean of their residuals, in its standard errors,
    those of the law at these entropies included. ``departed`` becomes true after ``patience`` steps in a row above ``limit``, and false
    again after as many below half of it.

    Attributes:
        residual: mean reward of the last ``window`` steps above (or, negative, below) what the law of the first half says; None before
            there is one. departed: whether the run has left that law.
    """

    def __init__(self, window: int = 20, patience: int = 5, limit: float = 4.0):
        self.window, self.patience, self.limit = window, patience, limit
        self.residual: float | None = None
        self.departed = False
        self._all, self._half = Line(), Line()
        self._later: deque[tuple[float, float]] = deque()  # the second half
        self._row = 0  # steps in a row that speak against ``departed`` as it is

    def update(self, step: int, entropy: float | None, reward: float | None) -> Forecast | None:
        """Take a step's mean entropy and reward; the forecast, None before there is one.

        A step where either is missing or not finite is left out.
        """
        if not _usable(entropy, reward):
            return _forecast(self._all)
        point = (math.exp(entropy), float(reward))
        self._all.add(*point)
        self._later.append(point)
        if self._half.n < self._all.n // 2:
            self._half.add(*self._later.popleft())
        self._compare()
        return _forecast(self._all)

    def _compare(self) -> None:
        law, recent = self._half, list(self._later)[-self.window :]
        if _forecast(law) is None:
            return
        x, y = np.array(recent).mean(0)
        self.residual = float(y - law.at(x))
        error = math.hypot(law.error(x), law.deviation * _mean_error(len(recent), law.correlation))
        outside = abs(self.residual) / max(error, 1e-12)
        against = outside < self.limit / 2 if self.departed else outside > self.limit
        self._row = self._row + 1 if against else 0
        if self._row == self.patience:
            self.departed, self._row = not self.departed, 0


def _mean_error(n: int, r: float) -> float:
    """Standard deviation of the mean of ``n`` values of an AR(1) series of standard deviation 1."""
    lags = np.arange(1, n)
    return math.sqrt((n + 2 * float(((n - lags) * r**lags).sum())) / n**2)
