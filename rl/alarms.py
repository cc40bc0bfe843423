"""What the alarms of a run look at: statistics of a few series over windows of logged steps, each with a threshold.

``recent`` is the mean of a series' last ``window`` logged values, ``early`` that of its first; a step without a value, or with one that is
not finite, is passed over. docs/alarms.md says why the thresholds are what they are, with a run that sets off each.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rl.errors import ConfigError
from rl.forecast import Line

ACTIONS = ("log", "checkpoint", "stop", "wandb.alert")

Metrics = Mapping[str, float | None]


class Reading(NamedTuple):
    """What a watch says at a step: whether its condition holds, the statistic, its threshold, a sentence; about: which of several."""

    holds: bool
    value: float
    threshold: float
    text: str
    about: str = ""


class Watch:
    """One alarm's condition.

    Args:
        window: logged steps of a mean. patience: so many steps in a row the condition holds before the alarm goes off; it can go off again
            once the condition has not held for ``window`` steps in a row. action: one or several of ``ACTIONS``; the line on the terminal
            and in alarms.jsonl comes with each of them.

    Raises:
        ConfigError: an action that does not exist, or a number that makes no sense.
    """

    def __init__(self, *, window: int, patience: int, action: str | Sequence[str]):
        self.window = whole("window", window, 2)
        self.patience = whole("patience", patience, 1)
        several = isinstance(action, list | tuple)
        self.actions = tuple(action) if several else () if action is None else (action,)
        if unknown := [each for each in self.actions if each not in ACTIONS]:
            raise ConfigError(f"action={unknown[0]} is not known. Expected one or several of: {', '.join(ACTIONS)}.")
        if not self.actions:
            raise ConfigError("action is empty. Expected at least log; the name of the alarm =null turns it off.")

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        """Take a step's metrics; nothing comes while too few steps are known, or where the step lacks the series."""
        raise NotImplementedError


class _Decay(Watch):
    """How fast the entropy falls: a line through ln H of the window, so that a steady share lost per step is a steady slope."""

    def __init__(self, *, window: int, patience: int, action: str | Sequence[str]):
        super().__init__(window=window, patience=patience, action=action)
        if self.window < 8:
            raise ConfigError(f"window={window} is too short for a slope. Expected at least 8.")
        self._points: deque[tuple[int, float]] = deque(maxlen=self.window)

    def _take(self, step: int, metrics: Metrics) -> tuple[float, float, float, float] | None:
        """H on the line at this step; rate at which ln H falls per step, with the ends of its 95 % interval, slow and fast."""
        entropy = value_of(metrics, "entropy/mean")
        if entropy is None:
            return None
        self._points.append((step, math.log(max(entropy, 1e-6))))
        if len(self._points) < self.window:
            return None
        line = Line()
        for x, y in self._points:
            line.add(float(x), y)
        half = line.quantile() * line.slope_error()
        return math.exp(line.at(float(step))), -line.slope, -line.slope - half, -line.slope + half


class EntropyFloor(_Decay):
    """Soon at the floor: at the rate of the last ``window`` steps, ``entropy/mean`` reaches ``floor`` nats within ``within`` steps.

    Steps left = ln(H / floor) / rate, rate = the fall of ln H per step by least squares. It goes off when the late end of the 95 % interval
    of the steps left is at most ``within``, or when H is at the floor.
    """

    def __init__(self, *, floor: float, within: float, window: int, patience: int, action: str | Sequence[str]):
        super().__init__(window=window, patience=patience, action=action)
        self.floor, self.within = number("floor", floor, 0.0), number("within", within, 0.0)

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        if (found := self._take(step, metrics)) is None:
            return
        now, rate, slow, fast = found
        far = math.log(now / self.floor)
        if far <= 0:
            yield Reading(
                True, 0.0, self.within, f"the mean entropy, {now:.3f} nats, is at the floor of {self.floor:g}.{_WIDEN}"
            )
            return
        left, late, soon = (far / r if r > 0 else math.inf for r in (rate, slow, fast))
        text = (
            f"the mean entropy, {now:.3f} nats, reaches the floor of {self.floor:g} in {_steps(left)} steps at this rate "
            f"({_steps(soon)} to {_steps(late)}).{_WIDEN}"
        )
        yield Reading(late <= self.within, left, self.within, text)


class EntropySlope(_Decay):
    """Collapse under way: over the last ``window`` steps ``entropy/mean`` fell as if to halve in fewer than ``half_life`` steps.

    Half-life = ln 2 / rate, as in :class:`EntropyFloor`; judged at the slow end of the rate's 95 % interval.
    """

    def __init__(self, *, half_life: float, window: int, patience: int, action: str | Sequence[str]):
        super().__init__(window=window, patience=patience, action=action)
        self.half_life = number("half_life", half_life, 0.0)

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        if (found := self._take(step, metrics)) is None:
            return
        now, rate, slow, _ = found
        value, longest = (math.log(2) / r if r > 0 else math.inf for r in (rate, slow))
        text = (
            f"the mean entropy, {now:.3f} nats, halves every {_steps(value)} steps (at most {_steps(longest)}).{_WIDEN}"
        )
        yield Reading(longest < self.half_life, value, self.half_life, text)


class Share(Watch):
    """Too much of something: the recent mean of ``series``, a share, is at least ``above``. Args: what: it in words."""

    def __init__(
        self, *, series: str, what: str, above: float, window: int, patience: int, action: str | Sequence[str]
    ):
        super().__init__(window=window, patience=patience, action=action)
        self.series, self.what = named("series", series), str(what)
        self.above = number("above", above, 0.0, 1.0)
        self._trace = Trace(self.window)

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        if self._trace.add(value_of(metrics, self.series)) and self._trace.full:
            share = self._trace.recent
            yield Reading(
                share >= self.above, share, self.above, f"{share:.0%} of {self.what} over {self.window} steps."
            )


class Length(Watch):
    """Completions became short or long: recent ``rollout/len`` over early ``rollout/len`` is below ``low`` or above ``high``."""

    def __init__(self, *, low: float, high: float, window: int, patience: int, action: str | Sequence[str]):
        super().__init__(window=window, patience=patience, action=action)
        self.low, self.high = number("low", low, 0.0, 1.0), number("high", high, 1.0)
        self._trace = Trace(self.window)

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        trace = self._trace
        if not trace.add(value_of(metrics, "rollout/len")) or not trace.comparable or trace.early <= 0:
            return
        ratio = trace.recent / trace.early
        text = f"completions have {trace.recent:.1f} tokens, {ratio:.0%} of the first {self.window} steps' {trace.early:.1f}. Read some in rollouts/: is the reward paid by the token?"
        yield Reading(not self.low <= ratio <= self.high, ratio, self.low if ratio < 1 else self.high, text)


class IdlePlugin(Watch):
    """A plug-in that has touched no token in ``window`` steps, each by itself; of a shadow, would have touched."""

    def __init__(self, *, window: int, patience: int, action: str | Sequence[str]):
        super().__init__(window=window, patience=patience, action=action)
        self._traces: dict[str, Trace] = {}
        self._shadows: set[str] = set()

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        self._shadows |= {
            name.split("/")[1] for name in metrics if name.startswith("shadow/")
        }  # not logged at each step
        for name in metrics:
            if name.startswith("plugin/") and name.endswith("/touched"):
                trace = self._traces.setdefault(name, Trace(self.window))
                if trace.add(value_of(metrics, name)) and trace.full:
                    plugin = name.split("/")[1]
                    has = ", a shadow, would have" if plugin in self._shadows else " has"
                    text = f"plugin.{plugin}{has} touched no token for {self.window} steps: a silent no-op. {_IDLE}"
                    yield Reading(trace.recent == 0.0, trace.recent, 0.0, text, plugin)


class HollowReward(Watch):
    """The reward rises while the entropy collapses, and something independent of the reward says that nothing was learnt.

    All three must hold, recent against early: ``reward/mean`` is up by at least ``rise`` times the early ``reward/std``; ``entropy/mean`` is
    at most ``entropy`` times its early value; and one of

    - check: the series of that name, which should rise with the reward, is not above its early mean by two standard errors;
    - length: ``rollout/len`` is at most ``length`` times its early value, so that the reward is had by saying less;
    - answers: ``rollout/distinct_answers`` is at most ``answers`` while under half of the groups have equal rewards: completions with the
      same answer are paid differently, so it is not the answer that is paid for.

    Args: check: null for none; a true grade logged beside the reward is best (``reward.correct.weight=0``).
    """

    def __init__(
        self,
        *,
        rise: float,
        entropy: float,
        check: str | None,
        length: float,
        answers: float,
        window: int,
        patience: int,
        action: str | Sequence[str],
    ):
        super().__init__(window=window, patience=patience, action=action)
        self.rise, self.entropy = number("rise", rise, 0.0), number("entropy", entropy, 0.0, 1.0)
        self.length, self.answers = number("length", length, 0.0, 1.0), number("answers", answers, 1.0)
        self.check = None if check is None else named("check", check)
        names = ("reward/mean", "reward/std", "entropy/mean", "rollout/len", "rollout/distinct_answers")
        names += ("rollout/zero_std_groups", *([check] if check else []))
        self._traces = {name: Trace(self.window) for name in names}

    def read(self, step: int, metrics: Metrics) -> Iterator[Reading]:
        known = [trace.add(value_of(metrics, name)) for name, trace in self._traces.items()]
        if self.check and self._traces["reward/mean"].count == self.window and not self._traces[self.check].count:
            warnings.warn(
                f"alarm.hollow_reward.check={self.check}: the run has logged no such series in {self.window} steps, so it cannot "
                "tell anything. Expected one of metrics.jsonl, as reward/correct.",
                stacklevel=2,
            )
        reward, spread, entropy = (self._traces[n] for n in ("reward/mean", "reward/std", "entropy/mean"))
        if not all(known[:3]) or not all(t.comparable for t in (reward, spread, entropy)) or spread.early <= 0:
            return
        rise = (reward.recent - reward.early) / spread.early
        falls = entropy.recent <= self.entropy * entropy.early
        signs = list(self._signs())
        text = (
            f"the reward rose from {reward.early:.2f} to {reward.recent:.2f} while the entropy fell from {entropy.early:.3f} to "
            f"{entropy.recent:.3f} nats, and {' and '.join(signs) or 'nothing speaks against it'}. Read some completions in rollouts/."
        )
        yield Reading(rise >= self.rise and falls and bool(signs), rise, self.rise, text)

    def _signs(self) -> Iterator[str]:
        check = self._traces.get(self.check)
        if check is not None and check.comparable and check.recent <= check.early + 2 * check.error:
            yield f"{self.check} did not rise ({check.early:.2f} to {check.recent:.2f})"
        length = self._traces["rollout/len"]
        if length.comparable and length.recent <= self.length * length.early:
            yield f"completions shrank from {length.early:.1f} to {length.recent:.1f} tokens"
        answers, equal = self._traces["rollout/distinct_answers"], self._traces["rollout/zero_std_groups"]
        if answers.comparable and equal.comparable and answers.recent <= self.answers and equal.recent < 0.5:
            yield f"groups have {answers.recent:.2f} distinct answers, yet only {equal.recent:.0%} of them equal rewards"


class Trace:
    """The first and the last ``window`` values of a series."""

    def __init__(self, window: int):
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=window)
        self._window, self.count = window, 0

    def add(self, value: float | None) -> bool:
        """Whether there was a value to take."""
        if value is None:
            return False
        if len(self._first) < self._window:
            self._first.append(value)
        self._last.append(value)
        self.count += 1
        return True

    @property
    def full(self) -> bool:
        return self.count >= self._window

    @property
    def comparable(self) -> bool:
        """Whether no value is in both windows."""
        return self.count >= 2 * self._window

    @property
    def early(self) -> float:
        return sum(self._first) / len(self._first)

    @property
    def recent(self) -> float:
        return sum(self._last) / len(self._last)

    @property
    def error(self) -> float:
        """Standard error of ``recent - early``, values taken for independent."""
        squares = [
            (v - mean) ** 2 for values, mean in ((self._first, self.early), (self._last, self.recent)) for v in values
        ]
        return math.sqrt(sum(squares) / (self._window - 1) / self._window)


def value_of(metrics: Metrics, name: str) -> float | None:
    """A step's value of a series; None where it has none or one that is not finite."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def number(name: str, value: float, above: float, most: float = math.inf) -> float:
    """``value``, if it is a finite number above ``above`` (from 1 on: or equal to it) and at most ``most``; else ConfigError."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and (above < value or above == value >= 1) and value <= most:
        return float(value)
    limit = "" if math.isinf(most) else f" and at most {most:g}"
    raise ConfigError(
        f"{name}={value} makes no sense. Expected a number {'of at least' if above >= 1 else 'above'} {above:g}{limit}."
    )


def named(name: str, value: str) -> str:
    """``value``, if it can be the name of a series; else ConfigError."""
    if isinstance(value, str) and value:
        return value
    raise ConfigError(f"{name}={value} is no series. Expected a name as in metrics.jsonl, as reward/correct.")


def whole(name: str, value: int, least: int) -> int:
    """``value``, if it is a whole number of at least ``least``; else ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise ConfigError(f"{name}={value} makes no sense. Expected a whole number of at least {least}.")


def _steps(count: float) -> str:
    return f"{count:.0f}" if count < 1e5 else "ever more"


_WIDEN = " Look at a lower trainer.learning_rate, a higher trainer.epsilon_high, or another plug-in."
_IDLE = "Its settings may be neutral, all advantages may be zero, or an earlier plug-in keeps no token."
