import numpy as np
import pytest

from rl.study.geometry import of_eigenvalues, spectrum


def test_golden_numbers():
    found = of_eigenvalues(np.array([4, 2, 1, 0.5]))
    assert found.rankme == pytest.approx(3.117142110535, abs=1e-10)
    assert found.alpha == pytest.approx(1.459021958291, abs=1e-10)
    assert of_eigenvalues(1 / np.arange(1, 100)).alpha == pytest.approx(1.0)
    assert of_eigenvalues(np.ones(7)).rankme == pytest.approx(7.0)


def test_eigenvalues_are_those_of_the_covariance():
    states = np.random.default_rng(0).normal(size=(50, 4)) * [3.0, 2.0, 1.0, 0.1] + 5
    expected = np.sort(np.linalg.eigvalsh(np.cov(states.T)))[::-1]
    assert spectrum(states).eigenvalues == pytest.approx(expected)
    assert spectrum(states @ np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]).rankme == pytest.approx(
        spectrum(states).rankme
    )


@pytest.mark.parametrize("states", [np.ones((5, 3)), np.ones((1, 3)), np.zeros((0, 3))])
def test_states_that_are_all_the_same_have_no_spectrum(states):
    assert np.isnan(spectrum(states).rankme) and np.isnan(spectrum(states).alpha)


def test_few_states_span_few_directions():
    found = spectrum(np.random.default_rng(0).normal(size=(3, 64)))
    assert len(found.eigenvalues) == 2 and 1 < found.rankme <= 2 and np.isnan(found.alpha)
