"""The forecast: golden numbers, how often its interval holds, how often it cries wolf, and what it made of two real runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rl.callbacks.forecast import WithForecast
from rl.forecast import Forecast, Line, Online, fit, student

RECORDED = Path(__file__).parents[1] / "recorded"


def synthetic(generator, steps, correlation, deviation=0.05, a=1.0, b=2.0):
    """Entropy that falls from 0.35 to 0.1 and rewards on the law, but for AR(1) noise: the size of both is the embedded task's."""
    entropy = 0.1 + 0.25 * np.exp(-3 * np.arange(steps) / steps)
    noise, shocks = np.empty(steps), generator.normal(size=steps)
    noise[0] = shocks[0]
    for t in range(1, steps):
        noise[t] = correlation * noise[t - 1] + math.sqrt(1 - correlation**2) * shocks[t]
    reward = -a * np.exp(entropy) + b + deviation * noise
    return entropy + 0.004 * generator.normal(size=steps), reward


def series(name):
    return json.loads((RECORDED / f"{name}.json").read_text())["series"]


def test_known_coefficients_come_back():
    entropy = np.linspace(1.2, 0.2, 50)
    found = fit(entropy, -0.7 * np.exp(entropy) + 2.5)
    assert found.n == 50 and found.a == pytest.approx(0.7) and found.b == pytest.approx(2.5)
    assert found.ceiling == pytest.approx(1.8) and found.r2 == pytest.approx(1)
    assert found.low == pytest.approx(1.8, abs=1e-6) and found.high == pytest.approx(1.8, abs=1e-6)


def test_sums_give_what_numpy_gives_of_all_points():
    generator = np.random.default_rng(0)
    entropy, reward = synthetic(generator, 80, 0.5)
    x, line = np.exp(entropy), Line()
    for point in zip(x, reward, strict=True):
        line.add(*point)
    (slope, intercept), covariance = np.polyfit(x, reward, 1, cov=True)
    residuals = reward - slope * x - intercept
    raw = (residuals[1:] @ residuals[:-1]) / (residuals @ residuals)
    r = (raw + 2 / 80) / (1 - 4 / 80)
    inflation = (1 + r) / (1 - r)
    assert line.slope == pytest.approx(slope) and line.at(1.0) == pytest.approx(intercept + slope)
    assert line.correlation == pytest.approx(r) and line.r2 == pytest.approx(1 - residuals.var() / reward.var())
    deviation = math.sqrt(residuals @ residuals / (80 - 2 * inflation))
    independent = math.sqrt(covariance[0, 0]) / math.sqrt(residuals @ residuals / 78)
    assert line.slope_error() == pytest.approx(deviation * math.sqrt(inflation) * independent)
    at = np.array([1.0, 1.0])
    design = np.stack([np.ones(80), x], 1)
    expected = deviation * math.sqrt(inflation * at @ np.linalg.inv(design.T @ design) @ at)
    assert line.error(1.0) == pytest.approx(expected)


@pytest.mark.parametrize(("freedom", "exact"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (60, 2.0003), (1e9, 1.95996)])
def test_students_quantile(freedom, exact):
    assert student(freedom) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 0.8])
def test_the_interval_holds_the_ceiling_in_95_percent_of_runs(correlation):
    generator = np.random.default_rng(5)
    found = [fit(*synthetic(generator, 100, correlation)) for _ in range(300)]
    assert 0.90 <= np.mean([f.low <= 1.0 <= f.high for f in found]) <= 0.98


def departures(make, runs, steps=160):
    gone = 0
    for seed in range(runs):
        online, ever = Online(), False
        for step, (h, r) in enumerate(zip(*make(np.random.default_rng(seed), steps), strict=True)):
            online.update(step, h, r)
            ever |= online.departed
        gone += ever
    return gone / runs


def test_a_run_on_the_law_seldom_leaves_it_and_one_that_finds_new_reward_does():
    assert departures(lambda g, n: synthetic(g, n, 0.6), 60) <= 0.05

    def new_reward(generator, steps):
        entropy, reward = synthetic(generator, steps, 0.3)
        return entropy, reward + 0.15 * (np.arange(steps) > 120)

    assert departures(new_reward, 20) >= 0.9


def test_departure_ends_when_the_law_holds_again():
    entropy, reward = synthetic(np.random.default_rng(0), 400, 0.0)
    reward[100:140] += 0.3
    online, flags = Online(), []
    for step, (h, r) in enumerate(zip(entropy, reward, strict=True)):
        online.update(step, h, r)
        flags.append(online.departed)
    first = flags.index(True)
    assert 100 <= first < 120 and flags[130] and not flags[399]
    assert sum(a != b for a, b in zip(flags, flags[1:], strict=False)) == 2


def test_nothing_is_said_before_there_is_something_to_say():
    entropy, reward = synthetic(np.random.default_rng(0), 100, 0.0)
    assert fit(entropy[:29], reward[:29]) is None and fit(entropy[:30], reward[:30]) is not None
    assert fit([], []) is None
    noise = np.random.default_rng(0).normal(0.3, 0.01, 200)  # it moves, but goes nowhere
    assert fit(noise, reward[:1].repeat(200)) is None
    assert fit([0.3] * 50, reward[:50]) is None


def test_steps_without_numbers_are_passed_over():
    entropy, reward = synthetic(np.random.default_rng(0), 60, 0.3)
    known = fit(entropy, reward)
    gaps = [*entropy[:40], math.nan, 0.2, math.inf, 400.0, *entropy[40:]]
    assert fit(gaps, [*reward[:40], 0.5, math.nan, 0.5, 0.5, *reward[40:]]) == known
    online = Online()
    for h, r in zip(entropy, reward, strict=True):
        found = online.update(0, h, r)
    assert found == known == online.update(1, None, 0.5) == online.update(1, 0.5, None)
    with pytest.raises(ValueError, match="longer|shorter"):
        fit([0.1, 0.2], [0.1])


def test_a_reward_that_never_changes_has_a_ceiling_and_no_r2():
    entropy, _ = synthetic(np.random.default_rng(0), 60, 0.0)
    found = fit(entropy, [0.5] * 60)
    assert found.ceiling == found.low == found.high == 0.5 and math.isnan(found.r2)


def test_the_sink_adds_series_first_and_goes_on_bit_for_bit():
    entropy, reward = synthetic(np.random.default_rng(3), 90, 0.3)

    def lines(sink, start, end):
        for step in range(start, end):
            sink(step, {"entropy/mean": float(entropy[step]), "reward/mean": float(reward[step])}, {})

    def written(into):
        return lambda step, metrics, histograms: into.append(json.dumps({"step": step, **metrics}))

    straight, resumed = [], []
    lines(WithForecast([written(straight)]), 0, 90)
    lines(WithForecast([written(resumed)]), 0, 70)
    again = WithForecast([written(resumed)])
    again.replay(map(json.loads, resumed))
    assert len(resumed) == 70  # earlier lines are not logged again
    lines(again, 70, 90)
    assert straight == resumed
    assert "forecast/ceiling" not in straight[28] and "forecast/ceiling" in straight[29]
    assert "forecast/departed" not in straight[58] and json.loads(straight[59])["forecast/departed"] == 0.0


def test_what_half_of_a_real_run_said_of_the_other_half():
    """docs/alarms.md quotes these: the law held for fork_mask, and promised plain GRPO more than came."""
    said = {}
    for name in ("plain", "fork_mask"):
        run = series(f"alarms_{name}_1")
        entropy, reward = np.array(run["entropy/mean"]), np.array(run["reward/mean"])
        half: Forecast = fit(entropy[:80], reward[:80])
        predicted = half.b - half.a * np.exp(entropy[140:].mean())
        said[name] = [round(float(v), 2) for v in (half.ceiling, half.low, half.high, predicted, reward[140:].mean())]
    assert said == {"plain": [0.85, 0.80, 0.89, 0.69, 0.59], "fork_mask": [0.88, 0.81, 0.96, 0.60, 0.55]}


def test_which_default_runs_left_the_law_of_their_first_half():
    """A slow drift, which the law of all but the last steps would follow (docs/alarms.md)."""
    left = {}
    for name in ("plain_1", "plain_2", "plain_3", "fork_mask_1", "fork_mask_2", "fork_mask_3"):
        run, online = series(f"alarms_{name}"), Online()
        for step, (h, r) in enumerate(zip(run["entropy/mean"], run["reward/mean"], strict=True), 1):
            online.update(step, h, r)
            if online.departed:
                left.setdefault(name, step)
    assert left == {"plain_1": 149, "plain_3": 137}
