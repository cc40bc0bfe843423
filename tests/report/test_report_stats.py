"""Numbers worked out by hand, and laws that hold for any numbers."""

import itertools
import math

import numpy as np
import pytest

from rl.estimators import pass_at_k
from rl.report import stats as s


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert s.iqm(np.arange(1.0, 9.0)) == 4.5  # 3 4 5 6
    assert s.iqm([0, 0, 1, 2, 3, 100, 100, 1000]) == np.mean([1, 2, 3, 100])
    assert s.iqm([1, 2, 6]) == 3.0  # of fewer than four, the mean
    assert s.iqm([0, 1, 2, 3, 90]) == 2.0
    assert s.iqm(np.array([[1.0, 8], [2, 7], [3, 6], [4, 5]])) == 4.5  # runs and tasks together
    assert s.iqm(np.array([[1.0, 10], [2, 20], [3, 30], [40, 400]]), axis=0).tolist() == [2.5, 25.0]


def test_the_bootstrap_over_runs_draws_within_each_task():
    # two tasks far apart: whatever runs are drawn, half the scores are of each task
    scores = np.array([[0.0, 10.0], [0.0, 10.0], [0.0, 10.0]])
    assert s.over_runs(scores) == s.Interval(5.0, 5.0, 5.0)


def test_the_bootstrap_agrees_with_all_resamples_of_five_runs():
    values = np.array([0.1, 0.25, 0.4, 0.45, 0.6])
    means = [s.iqm(drawn) for drawn in itertools.product(values, repeat=5)]
    found = s.over_runs(values[:, None])
    assert found.value == pytest.approx(np.mean(values[1:4]))
    for end, below in (
        (found.low, 0.025),
        (found.high, 0.975),
    ):  # the means are few different numbers: a quantile is one of them
        assert np.mean(np.array(means) < end - 1e-9) <= below + 0.01
        assert np.mean(np.array(means) <= end + 1e-9) >= below - 0.01
    assert math.isnan(s.over_runs(values[:1, None]).low)


def test_the_bands_of_curves_are_the_bootstrap_of_each_point():
    curves = np.random.default_rng(3).normal(size=(9, 4))
    middle, low, high = s.band(curves)
    for point in range(4):
        alone = s.over_runs(curves[:, point : point + 1])
        assert middle[point] == pytest.approx(alone.value)
        assert low[point] == pytest.approx(alone.low, abs=0.12) and high[point] == pytest.approx(alone.high, abs=0.12)
    middle, low, high = s.band(curves[:3])
    assert np.allclose(middle, curves[:3].mean(0))
    assert np.allclose(low, curves[:3].min(0)) and np.allclose(high, curves[:3].max(0))


def test_a_sign_flip_test_counts_every_assignment_of_signs():
    # of 1 2 3 the sums of all 8 assignments are +-6 +-4 +-2 +-0: as far as 6 are 2 of 8
    assert s.sign_flip([1.0, 2.0, 3.0]) == s.PValue(0.25, 3, 0.25, True)
    # 1 2 -3: the sum is 0, and all are at least as far
    assert s.sign_flip([1.0, 2.0, -3.0]).p == 1.0
    # 3 2 -1 (sum 4): +-6 and +-4, so 4 of 8
    assert s.sign_flip([3.0, 2.0, -1.0]).p == 0.5
    assert s.sign_flip([0.1] * 5).p == 2 / 32  # five seeds cannot say more
    assert s.sign_flip([0.0, 0.0]).p == 1.0


def test_beyond_thirteen_differences_flips_are_drawn_and_agree_with_the_exact_test():
    differences = np.random.default_rng(5).normal(0.4, 1.0, size=14)
    signs = np.array(list(itertools.product([-1, 1], repeat=14)))
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    found = s.sign_flip(differences)
    assert not found.exact and found.p == pytest.approx(exact, abs=0.015)
    assert s.sign_flip(np.ones(300)).p == found.smallest == 1 / 10_001
    assert s.sign_flip(-differences).p == pytest.approx(found.p)


def test_holms_correction():
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # 3 x .01, then 2 x .03, and .04 not below it
    assert s.holm([0.6, 0.7]) == [1.0, 1.0]
    assert s.holm([]) == []


def test_the_probability_of_improvement_counts_pairs_of_runs_and_ties_by_half():
    a, b = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    assert s.improvement(a, b).value == (0.5 + 0 + 1 + 1) / 4
    assert s.improvement(b, a).value == pytest.approx(1 - s.improvement(a, b).value)
    assert s.improvement(a + 10, b) == s.Interval(1.0, 1.0, 1.0)
    assert math.isnan(s.improvement(a[:1], b).low)


def test_pass_at_k_is_the_estimator_of_the_evaluation():
    found = s.pass_curves(np.array([0, 1, 5, 16]), 16, [1, 4, 16])
    assert np.allclose(found, [[pass_at_k(16, c, k) for k in (1, 4, 16)] for c in (0, 1, 5, 16)])


@pytest.mark.parametrize(
    ("a", "b", "k"),
    [
        ([0.4, 0.5, 0.6], [0.2, 0.5, 0.8], 2.0),
        ([0.4, 0.5, 0.5], [0.3, 0.4, 0.8], 2.25),  # behind by .1 at 2, ahead by .3 at 3
        ([0.4, 0.5, 0.6], [0.3, 0.4, 0.5], math.inf),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 1.0),
        ([0.4, 0.5, 0.6], [0.4, 0.5, 0.6], math.inf),
    ],
)
def test_where_one_curve_overtakes_another(a, b, k):
    assert s.crossover(np.array([a]), np.array([b]), [1, 2, 3]).value == pytest.approx(k)


def test_the_crossover_has_an_interval_over_problems():
    rng = np.random.default_rng(0)
    ks = list(range(1, 17))
    # a: sure of half of the problems and lost on the others; b: a third of the samples everywhere
    a = s.pass_curves(np.repeat([16, 0], 100), 16, ks)
    b = s.pass_curves(rng.binomial(16, 1 / 3, 200), 16, ks)
    found = s.crossover(a, b, ks)
    assert found.low < found.value < found.high < 4
    assert s.crossover(a, a * 0.5, ks) == s.Interval(math.inf, math.inf, math.inf)
    few = s.crossover(a[95:105], b[95:105], ks)
    assert few.high - few.low > found.high - found.low


def test_the_interval_over_problems_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = s.over_problems(rng.binomial(16, 0.4, 100) / 16)[1:]
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.99
