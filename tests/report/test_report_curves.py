"""Curves over steps and over consumed entropy, of known series."""

import numpy as np
import pandas as pd
import pytest

from rl.report import curves
from rl.report.reading import read_run
from synthetic import write_run


@pytest.fixture
def run(tmp_path):
    count = iter(range(100))
    return lambda **settings: read_run(write_run(tmp_path / f"run{next(count)}", kept=False, **settings))


def test_consumed_entropy_starts_at_zero_and_never_falls():
    entropy = pd.Series([1.0, 1, 1, 1, 1, 0.8, 0.5, 0.9, 0.4, 1.2])
    assert curves.consumed(entropy, 1).round(6).tolist() == [0, 0, 0, 0, 0, 0.2, 0.5, 0.5, 0.6, 0.6]
    assert curves.consumed(pd.Series([0.1, 0.2, 0.3, 0.4]), 1).max() == pytest.approx(
        0.15
    )  # the first step is below the mean


def test_entropy_that_rises_is_not_consumed(run):
    rising = run(entropy=lambda t: 0.4 + t, reward=lambda t: 0.3 + 0.3 * t)
    curve = curves.against_consumed([rising], "reward/mean", 1)
    # one place at 0 or near it, where the reward is the last one
    assert curve.x[-1] < 0.2 and curve.middle[-1] == pytest.approx(0.6)


def test_a_budget_ends_where_the_next_step_would_exceed_it(run):
    entropy, reward = [1, 1, 1, 1, 1, 0.9, 0.8, 0.7], [1, 2, 3, 4, 5, 6, 7, 8]
    steps = run(steps=8, entropy=lambda t: entropy[round(7 * t)], reward=lambda t: reward[round(7 * t)])
    curve = curves.against_consumed([steps], "reward/mean", 1)
    assert curve.middle[0] == 5 and curve.middle[-1] == 8
    assert set(curve.middle[(curve.x > 0.101) & (curve.x < 0.199)]) == {6}


def test_reward_at_a_budget_is_that_of_the_last_step_within_it(run):
    # entropy falls evenly by 0.3, reward rises evenly by 0.3: the same budget buys the same reward however fast it is spent
    line = curves.against_consumed([run(steps=400)], "reward/mean", 1)
    assert line.middle[-1] == pytest.approx(0.6, abs=2e-3)
    half = np.interp(line.x[-1] / 2, line.x, line.middle)
    assert half == pytest.approx(0.45, abs=5e-3)
    fast = run(steps=400, entropy=lambda t: 0.4 - 0.3 * min(1, 2 * t), reward=lambda t: 0.3 + 0.3 * min(1, 2 * t))
    again = curves.against_consumed([fast], "reward/mean", 1)
    assert np.allclose(np.interp(line.x, again.x, again.middle), line.middle, atol=5e-3)


def test_curves_of_runs_of_different_lengths_end_with_the_shortest(run):
    curve = curves.against_steps([run(steps=30), run(steps=20, seed=2)], "reward/mean", 1)
    assert curve.x[-1] == 20 and curve.runs == 2
    assert curve.low[-1] == pytest.approx(0.3 + 0.3 * 19 / 29) and curve.high[-1] == pytest.approx(0.6)


def test_a_series_that_no_run_has_is_no_curve_and_long_runs_are_thinned(run):
    assert curves.against_steps([run()], "policy/kl", 1) is None
    assert curves.against_consumed([run(), run()], "policy/kl", 1) is None
    long = curves.against_steps([run(steps=1000)], "reward/mean", 1)
    assert len(long.x) == curves.POINTS and (long.x[0], long.x[-1]) == (1, 1000)
    assert curves.window([run(steps=200), run(steps=20)]) == 10
