"""Entropy dynamics: what the tokens' entropy does, step by step, at constant memory and communication.

Everything is over the trainable tokens of the step's micro-batches on all ranks, in nats at the rollout temperature, of the
policy at the moment of its forward. Sums and counts are added, averages never averaged. A series of no token is left out,
never reported as 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl.contract import Mean, Signal, TokenBatch
from rl.reduce import all_sum

_LOW, _HIGH, _BINS = 1e-4, 20.0, 512  # log-spaced: a factor of 1.024 a bin; ln of the largest vocabularies is below 13
_SHOWN = 64

_SERIES = (
    "entropy/mean",
    "entropy/kept",
    "entropy/dropped",
    "entropy/positive_advantage",
    "entropy/negative_advantage",
    *(f"entropy/position_q{q}" for q in (1, 2, 3, 4)),
    "entropy/predicted_change",
    "entropy/above_reference_p80",
)


class Histogram(NamedTuple):
    """Counts between consecutive edges, in nats: ``len(edges) == len(counts) + 1``."""

    counts: list[int]
    edges: list[float]


class Dynamics:
    """Accumulates micro-batches, and gives one step's series at ``flush``.

    Args:
        reference_p80: the warm start's 80 % quantile of entropy, for the share of tokens above it; None leaves it out. The same
            on every rank.
    """

    def __init__(self, reference_p80: float | None = None):
        self.reference_p80 = reference_p80
        self._last_mean: float | None = None
        self._reset()

    def _reset(self) -> None:
        # the same on every rank, whatever it has seen: sums and counts of the series, counts and sums of the bins
        self._means = torch.zeros(len(_SERIES), 2, dtype=torch.float64)
        self._histogram = torch.zeros(2, _BINS + 1, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, tokens: TokenBatch, signal: Signal, lr: float) -> None:
        """Add one micro-batch. ``lr`` scales the predicted change."""
        h, mask = tokens.entropy.detach().float(), tokens.mask
        kept, sign = signal.keep & mask, signal.advantages.sign()
        position = (mask.cumsum(-1) - 1) * 4 // mask.sum(-1, keepdim=True).clamp(min=1)
        groups = {
            "entropy/mean": mask,
            "entropy/kept": kept,
            "entropy/dropped": mask & ~kept,
            "entropy/positive_advantage": mask & (sign > 0),
            "entropy/negative_advantage": mask & (sign < 0),
        }
        groups |= {f"entropy/position_q{q + 1}": mask & (position == q) for q in range(4)}
        means = {name: Mean.of(h, where) for name, where in groups.items()}
        means["entropy/predicted_change"] = Mean.of(-lr * _omega(tokens, signal), mask)
        known = self.reference_p80 is not None
        means["entropy/above_reference_p80"] = Mean.of((h > (self.reference_p80 or 0.0)).float(), mask & known)
        added = torch.stack([torch.stack([means[name].total.double(), means[name].count.double()]) for name in _SERIES])
        self._means = self._means.to(h.device) + added
        self._histogram = self._histogram.to(h.device) + _histogram(h[mask])

    def flush(self, device: torch.device | None = None) -> tuple[dict[str, float], dict[str, Histogram]]:
        """The step's series and its histogram, reduced over ranks in one collective; every rank must call it, also one that
        has seen nothing, whose ``device`` says where sums over ranks are made."""
        packed = torch.cat([self._means.flatten(), self._histogram.flatten()])
        packed = all_sum(packed if device is None else packed.to(device)).cpu()
        means, histogram = packed[: self._means.numel()].view(-1, 2), packed[self._means.numel() :].view(2, -1)
        self._reset()
        counts, sums = histogram
        if counts.sum() == 0:
            return {}, {}
        metrics = {name: (t / n).item() for name, (t, n) in zip(_SERIES, means, strict=True) if n > 0}
        for q in (50, 80, 95):
            metrics[f"entropy/p{q}"] = _quantile(counts, q / 100)
        metrics["entropy/top20_mean"] = _top_mean(counts, sums, 0.2)
        if self._last_mean is not None:
            metrics["entropy/measured_change"] = metrics["entropy/mean"] - self._last_mean
        self._last_mean = metrics["entropy/mean"]
        return metrics, {"entropy/hist": _shown(counts)}

    def state_dict(self) -> dict[str, Any]:
        """What the next ``measured_change`` needs after a resume, and the warm start's quantile."""
        return {"last_mean": self._last_mean, "reference_p80": self.reference_p80}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_mean, self.reference_p80 = state["last_mean"], state["reference_p80"]


def _omega(tokens: TokenBatch, signal: Signal) -> Tensor:
    """First-order entropy change per unit of logit step, ``-dH = A r p (1 - p) (ln p + H)``.

    A is the effective advantage. A policy-gradient step of size lr on the token's own logit changes its entropy by
    ``-lr`` times this; the optimizer's real step in logits has another scale, so compare sign and shape, not size.
    Source: STEER (arXiv 2510.10150), theorem, without the clip indicator.
    """
    logp = tokens.logp.detach().float()
    p, ratio = logp.exp(), (logp - tokens.old_logp.float()).exp()
    return signal.effective.float() * ratio * p * (1 - p) * (logp + tokens.entropy.detach().float())


def _edges() -> Tensor:
    """Lower edges of all bins but the first, which holds everything below 1e-4 nats."""
    return torch.logspace(math.log10(_LOW), math.log10(_HIGH), _BINS + 1, dtype=torch.float64)


def _histogram(h: Tensor) -> Tensor:
    position = torch.log(h.double().clamp(min=1e-300) / _LOW) * (_BINS / math.log(_HIGH / _LOW))
    index = (position.floor().long() + 1).clamp(0, _BINS)
    out = torch.zeros(2, _BINS + 1, dtype=torch.float64, device=h.device)
    out[0].index_add_(0, index, torch.ones_like(position))
    out[1].index_add_(0, index, h.double())
    return out


def _quantile(counts: Tensor, q: float) -> float:
    """Interpolated within its bin; exact to the bin's width, 2.4 %."""
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), _edges()])
    cumulative = counts.cumsum(0)
    target = q * cumulative[-1]
    i = int(torch.searchsorted(cumulative, target).clamp(max=_BINS))
    inside = (target - (cumulative[i] - counts[i])) / counts[i].clamp(min=1)
    return (edges[i] + inside * (edges[i + 1] - edges[i])).item()


def _top_mean(counts: Tensor, sums: Tensor, share: float) -> float:
    """Mean of the largest ``share`` of the values; within the boundary bin its mean stands for each value."""
    budget = share * counts.sum()
    above = counts.flip(0).cumsum(0)
    taken = (budget - (above - counts.flip(0))).clamp(min=0).minimum(counts.flip(0))
    bin_mean = (sums / counts.clamp(min=1)).flip(0)
    return ((taken * bin_mean).sum() / budget).item()


def _shown(counts: Tensor) -> Histogram:
    """Coarsened to 64 log-spaced bins plus the one from 0."""
    coarse = counts[1:].view(_SHOWN, _BINS // _SHOWN).sum(-1)
    return Histogram([int(counts[0]), *coarse.long().tolist()], histogram_edges())


def histogram_edges() -> list[float]:
    """The edges of every histogram of entropies, nats."""
    return [0.0, *_edges()[:: _BINS // _SHOWN].tolist()]
