"""Hold the forking tokens' entropy inside a band, and anchor them to the reference policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rl.contract import Denominator, Explanation, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import fraction as check_fraction
from rl.plugins.checks import n_all_over_kept, one_of
from rl.reduce import Reduce

Version = Literal["v1", "v2"]
Selector = Literal["quantile", "otsu_exact", "otsu_hist100"]


class EntropyBand:
    """Train on each completion's forking tokens S only, and penalise their entropy outside a band.

    With S chosen per completion by the current policy's entropy and edges that carry no gradient::

        v1  lower, upper = 10 % and 50 % quantile of H_S;  policy, band and KL are means over S
        v2  upper = median(H_S), lower = max(0, upper - 1.4826 MAD(H_S));  policy and band over all N tokens, KL over S
        band  coef_low relu(lower - H_t) + coef_high relu(H_t - upper);  KL = kl_coef sum_v p (ln p - ln p_ref)

    Source: SPINE (arXiv 2511.17938) v1 and v2, and an independent re-implementation of v2; ``explain`` says what differs.

    Args:
        version: which of the two. selector: "quantile" takes the top ``fraction`` of each completion (v1's);
            "otsu_exact" the best two-class split of its sorted entropies, "otsu_hist100" the same on 100 bins (v2's).
        fraction: for the quantile selector. coef_low, coef_high: b_lo, b_hi. kl_coef: full-vocabulary KL on S.

    Raises:
        ConfigError: a value outside these.
    """

    neutral: Mapping[str, Any] = {
        "version": "v1",
        "selector": "quantile",
        "fraction": 1.0,
        "coef_low": 0.0,
        "coef_high": 0.0,
        "kl_coef": 0.0,
    }

    def __init__(
        self,
        *,
        version: Version = "v2",
        selector: Selector = "otsu_exact",
        fraction: float = 0.2,
        coef_low: float = 0.01,
        coef_high: float = 0.01,
        kl_coef: float = 0.01,
    ):
        one_of("entropy_band.version", version, get_args(Version))
        one_of("entropy_band.selector", selector, get_args(Selector))
        check_fraction("entropy_band.fraction", fraction, "0.2 selects the top 20 %.")
        for key, value in {"coef_low": coef_low, "coef_high": coef_high, "kl_coef": kl_coef}.items():
            if not value >= 0:
                raise ConfigError(f"plugin.entropy_band.{key}={value} would reward what it penalises. Expected >= 0.")
        self.version, self.selector, self.fraction = version, selector, fraction
        self.coef_low, self.coef_high, self.kl_coef = coef_low, coef_high, kl_coef
        self.needs = frozenset((["entropy.grad"] if coef_low or coef_high else []) + (["full_kl"] if kl_coef else []))
        # the denominator of v1 is the micro-batch's selected tokens
        self.promises = frozenset({"alone"} if version != "v1" else ())

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        h = tokens.entropy.detach()
        selected = (h >= self._threshold(tokens.mask, h)) & tokens.mask
        lower, upper = self._edges(selected, h)
        mean_over: Denominator = "kept" if self.version == "v1" else "all"
        rescale = n_all_over_kept(tokens, selected, "world") if mean_over == "kept" else None
        signal = signal.drop(tokens.mask & ~selected, rescale)
        if self.coef_low:
            signal = signal.penalise("low", (lower - tokens.entropy).relu(), self.coef_low, selected, mean_over)
        if self.coef_high:
            signal = signal.penalise("high", (tokens.entropy - upper).relu(), self.coef_high, selected, mean_over)
        if self.kl_coef:
            signal = signal.penalise("kl", tokens.full_kl, self.kl_coef, selected, "kept")
            signal = signal.log("kl", tokens.full_kl, selected)
        inside = (h >= lower) & (h <= upper)
        return signal.log("kept", selected.float(), tokens.mask).log("inside", inside.float(), selected)

    def explain(self) -> Explanation:
        """Selection, band and anchor at these settings."""
        v1 = self.version == "v1"
        selected = {
            "quantile": f"τ = the {1 - self.fraction:.4g}-quantile of H",
            "otsu_exact": "τ = the middle of the gap that best splits the sorted H in two (Otsu)",
            "otsu_hist100": "τ = the centre of the bin that best splits a histogram of 100 bins of H in two (Otsu)",
        }
        edges = (
            "lower, upper = the 0.1- and the 0.5-quantile of H in S"
            if v1
            else "upper = median of H in S,  lower = max(0, upper - max(1.4826 MAD, 0.000001))"
        )
        over: Denominator = "kept" if v1 else "all"
        penalties: dict[str, tuple[float, Denominator]] = {}
        lines = [f"keep = 1[H >= τ], the tokens S;  {selected[self.selector]}", edges]
        if self.coef_low:
            penalties["low"] = (self.coef_low, over)
            lines.append("low = relu(lower - H) over S")
        if self.coef_high:
            penalties["high"] = (self.coef_high, over)
            lines.append("high = relu(H - upper) over S")
        if self.kl_coef:
            penalties["kl"] = (self.kl_coef, "kept")
            lines.append("kl = Σ_v p_v (ln p_v - ln p_ref_v) over S, of the whole vocabulary")
        statistics: dict[str, Scope] = {"τ": "response", "lower and upper": "response"}
        return Explanation(
            formula=lines,
            reads=["entropy", *(["full_kl"] if self.kl_coef else [])],
            changes=["keep"],
            statistics=statistics | ({"n_all / n_kept": "world"} if v1 else {}),
            denominator=over,
            penalties=penalties,
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        yield "there is no official code"
        if self.version == "v1":
            yield "the paper leaves the denominators open: means over S are a reconstruction"
        if self.selector != ("quantile" if self.version == "v1" else "otsu_hist100"):
            theirs = "the top 20 % (quantile)" if self.version == "v1" else "100 bins (otsu_hist100)"
            yield f"the {'paper' if self.version == 'v1' else 're-implementation'} selects with {theirs}"
        yield "the coefficients of the band and the KL are a re-implementation's 0.01; the paper's are not known"
        yield "the re-implementation divides advantages by the population deviation of a group, TRL by the sample's"

    def _threshold(self, mask: Tensor, h: Tensor) -> Tensor:
        if self.selector == "quantile":
            return Reduce(mask).quantile(h, 1 - self.fraction, "response")
        return otsu_exact(mask, h) if self.selector == "otsu_exact" else otsu_hist(mask, h, bins=100)

    def _edges(self, selected: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper edge per completion, (B, 1); rows without a selected token get edges that penalise nothing."""
        quantile = Reduce(selected).quantile
        upper = quantile(h, 0.5, "response")
        if self.version == "v1":
            lower = quantile(h, 0.1, "response")
        else:
            spread = (1.4826 * quantile((h - upper).abs(), 0.5, "response")).clamp(min=1e-6)
            lower = (upper - spread).clamp(min=0.0)
        return lower.nan_to_num(nan=0.0), upper.nan_to_num(nan=math.inf)


def otsu_exact(mask: Tensor, h: Tensor) -> Tensor:
    """(B, 1) threshold midway in the gap that maximises the variance between two classes of each row's values.

    Maximises ``n0 n1 (mean0 - mean1)^2`` over all splits of the sorted values; -inf (select all) where all are equal.
    """
    if h.shape[1] < 2:
        return h.new_full((len(h), 1), -math.inf)
    n = mask.sum(-1, keepdim=True)
    ordered = h.masked_fill(~mask, math.inf).sort(dim=-1).values
    finite = ordered.where(ordered.isfinite(), 0.0)
    below = finite.cumsum(-1)[:, :-1]
    count = torch.arange(1, h.shape[1], device=h.device).expand_as(below)
    above = finite.sum(-1, keepdim=True) - below
    rest = (n - count).clamp(min=1)
    between = count * rest * (below / count - above / rest) ** 2
    gap = ordered[:, 1:] - ordered[:, :-1]
    between = between.masked_fill((count >= n) | ~(gap > 0), -1.0)  # a split needs two sides and different values
    best, split = between.max(-1, keepdim=True)
    middle = (finite.gather(-1, split) + finite.gather(-1, split + 1)) / 2
    return middle.where(best >= 0, -math.inf)


def otsu_hist(mask: Tensor, h: Tensor, bins: int) -> Tensor:
    """(B, 1) centre of the first bin that maximises Otsu's criterion on each row's histogram between its min and max.

    -inf (select all) where all values are equal. Parity with a re-implementation of SPINE v2.
    """
    low = Reduce(mask).min(h, "response")
    width = (Reduce(mask).max(h, "response") - low) / bins
    index = ((h - low) / width).nan_to_num(0.0, 0.0, 0.0).long().clamp(0, bins - 1)
    count = h.new_zeros(len(h), bins).scatter_add_(-1, index, mask.to(h.dtype))
    centre = low + (torch.arange(bins, device=h.device) + 0.5) * width
    mass = count * centre.where(count > 0, 0.0)
    n0, m0 = count.cumsum(-1), mass.cumsum(-1)
    n1, m1 = count.sum(-1, keepdim=True) - n0, mass.sum(-1, keepdim=True) - m0
    between = (n0 * n1 * (m0 / n0.clamp(min=1) - m1 / n1.clamp(min=1)) ** 2).masked_fill((n0 == 0) | (n1 == 0), -1.0)
    best, split = between.max(-1, keepdim=True)
    return centre.gather(-1, split).where((best > 0) & (width > 0), -math.inf)
