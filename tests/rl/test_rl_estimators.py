import itertools
import random
from math import comb

import numpy as np
import pytest

from rl.estimators import bootstrap_interval, combined_interval, maj_at_k, pass_at_k, vote, wilson_interval


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_average_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * c + [0] * (n - c)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    rng, p, k, n = random.Random(0), 0.2, 4, 10
    estimates = [pass_at_k(n, sum(rng.random() < p for _ in range(n)), k) for _ in range(20_000)]
    assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize(
    "n, c, k", [(1000, 3, 1), (1000, 3, 500), (10_000, 9_000, 64), (100_000, 1, 7), (100_000, 0, 7)]
)
def test_pass_at_k_of_many_samples_is_exact(n, c, k):
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), rel=1e-9, abs=1e-15)


def test_pass_at_k_keeps_the_digits_of_a_small_rate():
    assert pass_at_k(10**7, 1, 1) == pytest.approx(1e-7, rel=1e-12)


def test_naive_pass_at_k_would_be_biased():
    """What 1 - (1 - c / n)^k makes of n = k = 4 and one right sample in four: the reason for the formula."""
    assert pass_at_k(4, 1, 4) == 1.0 > 1 - (1 - 1 / 4) ** 4


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="Expected"):
        pass_at_k(n, c, k)


def test_vote():
    assert vote(["a", "b", "b"]) == 1
    assert vote(["a", "b"]) == 0  # a tie: the first
    assert vote([None, None, "b"]) == 2  # no answer does not vote
    assert vote([None, None]) is None


def test_maj_at_k_by_blocks():
    answers = ["a", "a", "b", "c", "b", "b", "x"]
    correct = [True, True, False, False, False, False, True]
    assert maj_at_k(answers, correct, 3) == 0.5  # block 1 says a: right; block 2 says b: wrong; x is left over
    assert maj_at_k([None] * 4, [False] * 4, 2) == 0.0
    with pytest.raises(ValueError, match="at least 8"):
        maj_at_k(answers, correct, 8)


def test_maj_at_k_is_unbiased():
    """Against the votes of all ordered draws of three from a known distribution of answers."""
    probability = {"right": 0.4, "wrong": 0.35, None: 0.25}
    truth = sum(
        np.prod([probability[a] for a in draw])
        for draw in itertools.product(probability, repeat=3)
        if (i := vote(draw)) is not None and draw[i] == "right"
    )
    rng = random.Random(0)
    drawn = rng.choices(list(probability), list(probability.values()), k=3 * 20_000)
    assert maj_at_k(drawn, [a == "right" for a in drawn], 3) == pytest.approx(truth, abs=0.01)


def coverage(problems, draw, truth, trials=400):
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(draw(rng, problems), seed=t, resamples=1000) for t in range(trials)]
    return sum(low <= truth <= high for low, high in intervals) / trials


def rates(a, b, n):
    """n samples each of problems whose rate is Beta(a, b)."""
    return lambda rng, problems: rng.binomial(n, rng.beta(a, b, problems)) / n


@pytest.mark.parametrize(
    "draw, truth",
    [
        (lambda rng, problems: rng.random(problems) < 0.4, 0.4),  # greedy: right or wrong
        (rates(2, 2, 16), 0.5),  # avg@16, problems of middling difficulty
        (rates(0.3, 0.7, 16), 0.3),  # most problems always or never solved
        (rates(1, 1, 4), 0.5),
    ],
)
def test_the_interval_covers_the_truth_at_its_rate(draw, truth):
    assert 0.93 <= coverage(100, draw, truth) <= 0.97


def test_the_interval_of_pass_at_k_covers_the_truth_at_its_rate():
    of = np.array([pass_at_k(16, c, 8) for c in range(17)])
    truth = 1 - np.prod([(1 + i) / (2 + i) for i in range(8)])  # rates uniform: E[1 - (1 - p)^8]
    assert 0.93 <= coverage(100, lambda rng, n: of[rng.binomial(16, rng.random(n))], truth) <= 0.97


@pytest.mark.parametrize(
    "problems, draw, truth",
    [
        (100, lambda rng, n: rng.random(n) < 0.01, 0.01),  # of 100 problems one or none is solved
        (30, lambda rng, n: rng.random(n) < 0.05, 0.05),
        (30, lambda rng, n: rng.random(n) < 0.97, 0.97),
        (30, rates(0.1, 3, 16), 0.1 / 3.1),
    ],
)
def test_the_interval_covers_where_the_percentile_bootstrap_does_not(problems, draw, truth):
    def percentile(values, rng):
        means = values[rng.integers(problems, size=(500, problems))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return low <= truth <= high

    rng = np.random.default_rng(0)
    plain = np.mean([percentile(np.asarray(draw(rng, problems), dtype=float), rng) for _ in range(200)])
    assert plain < 0.9 < 0.93 <= coverage(problems, draw, truth)


def test_of_rights_and_wrongs_the_interval_is_jeffreys():
    right, wrong = 7, 33
    rng = np.random.default_rng(1)
    expected = np.quantile(rng.beta(right + 0.5, wrong + 0.5, 400_000), [0.025, 0.975])
    got = bootstrap_interval([1.0] * right + [0.0] * wrong, seed=0, resamples=40_000)
    assert got == pytest.approx(expected, abs=0.003)


def test_extremes_are_one_sided_and_not_empty():
    low, high = bootstrap_interval([0.0] * 30, seed=0)
    assert low == 0.0 and 0.05 < high < 0.12  # the rule of three says 0.1
    low, high = bootstrap_interval([1.0] * 30, seed=0)
    assert high == 1.0 and 0.88 < low < 0.95
    for values in ([1.0] * 99 + [pass_at_k(16, 8, 8)], [0.999] * 50, [0.0] * 29 + [1e-4]):
        low, high = bootstrap_interval(values, seed=0)
        assert low <= np.mean(values) <= high  # nearer to an end than the interval reaches by itself
    low, high = bootstrap_interval([0.5], seed=0)
    assert 0 < low < 0.5 < high < 1


def test_wilsons_interval_is_where_the_rate_would_just_not_be_rejected():
    for correct, n in ((1, 10), (5, 10), (28, 32), (3, 400)):
        for end in wilson_interval(correct, n):
            assert abs(correct / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson_interval(10, 10) == (pytest.approx(0.72247, abs=1e-5), 1.0)
    for correct, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="Expected"):
            wilson_interval(correct, n)


def test_a_difference_of_rates_has_newcombes_interval():
    (l1, u1), (l2, u2) = wilson_interval(56, 70), wilson_interval(48, 80)
    # Newcombe (1998), table II, method 10, first example
    assert combined_interval([1, -1], [0.8, 0.6], [l1, l2], [u1, u2]) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert combined_interval([1.0], [0.8], [l1], [u1]) == pytest.approx((l1, u1))


def test_a_mean_of_rates_is_covered_at_its_rate():
    rng, weights, rates, n = np.random.default_rng(0), np.array([0.7, 0.25, 0.05]), np.array([0.5, 0.1, 0.02]), 32
    covered = 0
    for counts in rng.binomial(n, rates, (2000, 3)):
        low, high = zip(*(wilson_interval(int(c), n) for c in counts), strict=True)
        ends = combined_interval(weights, counts / n, low, high)
        covered += ends[0] <= weights @ rates <= ends[1]
    assert 0.93 < covered / 2000 < 0.98
