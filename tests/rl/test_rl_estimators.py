import itertools
import random

import pytest

from rl.estimators import bootstrap_interval, maj_at_k, pass_at_k, vote


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


def test_bootstrap_interval_covers_the_truth_at_its_rate():
    rng = random.Random(0)
    inside = 0
    for trial in range(300):
        low, high = bootstrap_interval([float(rng.random() < 0.4) for _ in range(80)], seed=trial, resamples=300)
        inside += low <= 0.4 <= high
    assert 0.90 <= inside / 300 <= 0.98
