"""How many directions hidden states use: RankMe and the exponent of their spectrum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Spectrum(NamedTuple):
    """Eigenvalues of a covariance, largest first, and what they come to.

    Attributes:
        rankme: exp of the entropy of the eigenvalues' shares, from 1 (one direction) to their number. alpha: eigenvalue i is about i^-alpha,
            by least squares in log-log; NaN of fewer than 3 eigenvalues.
    """

    eigenvalues: np.ndarray
    rankme: float
    alpha: float


def spectrum(states: np.ndarray) -> Spectrum:
    """Of hidden states (N, D), centred. At most N - 1 eigenvalues are not 0, so compare equal N only."""
    if len(states) < 2:
        return of_eigenvalues(np.zeros(0))
    centred = np.asarray(states, dtype=np.float64) - states.mean(0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    return of_eigenvalues(singular**2 / (len(states) - 1))


def of_eigenvalues(eigenvalues: np.ndarray) -> Spectrum:
    """RankMe ``exp(-sum q ln q)``, q the eigenvalues' shares, and alpha of ``lambda_i ~ i^-alpha``.

    Those below 1e-10 of the largest are rounding and left out. Source: arXiv 2509.23024, of eigenvalues; the RankMe of Garrido et al.
    (arXiv 2210.02885) takes singular values, which gives a higher number. alpha-ReQ: Agrawal et al. (NeurIPS 2022).
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
    values = values[values > 1e-10 * values[0]] if len(values) and values[0] > 0 else values[:0]
    if not len(values):
        return Spectrum(values, float("nan"), float("nan"))
    share = values / values.sum()
    rankme = float(np.exp(-(share * np.log(share)).sum()))
    if len(values) < 3:
        return Spectrum(values, rankme, float("nan"))
    slope = np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)[0]
    return Spectrum(values, rankme, float(-slope))
