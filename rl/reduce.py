"""Masked statistics over a scope. The only file that knows ``torch.distributed``; every result is detached.

Scopes: ``response`` one completion, ``micro`` this micro-batch on this rank, ``world`` the micro-batch on all ranks,
``rollout`` the whole generation batch on all ranks (only where the recorded values are handed in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Scope = Literal["response", "micro", "world", "rollout"]
SCOPES: tuple[Scope, ...] = ("response", "micro", "world", "rollout")

_QUANTILE_LIMIT = 2**24  # torch.quantile refuses more elements


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks; every rank must call it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(values: Tensor) -> tuple[Tensor, slice]:
    """Concatenate 1-D ``values`` of all ranks, in rank order; also says which slice is this rank's own."""
    values = values.detach()
    if world_size() == 1:
        return values, slice(0, values.numel())
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([values.numel()], device=values.device))
    lengths = [int(s) for s in sizes]
    padded = values.new_zeros(max(lengths))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    start = sum(lengths[: dist.get_rank()])
    return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)]), slice(start, start + values.numel())


def quantile(values: Tensor, q: float) -> Tensor:
    """The linearly interpolated ``q``-quantile of 1-D ``values``, of any length; NaN when there are none."""
    if values.numel() == 0:
        return values.new_full((), math.nan)
    if values.numel() <= _QUANTILE_LIMIT:
        return torch.quantile(values, q)
    position = q * (values.numel() - 1)
    low = int(position)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[min(low + 1, values.numel() - 1)], position - low)


def count_kept(n: Tensor | int, fraction: float) -> Tensor:
    """How many tokens a top-``fraction`` selection keeps: ``max(1, int(n * fraction + 0.9999))``, 0 of none.

    Source: Beyond the 80/20 Rule, official code. It is ceil(n * fraction) for any practical n.
    """
    n = torch.as_tensor(n)
    kept = (n.double() * fraction + 0.9999).long().clamp(min=1)
    return torch.minimum(kept, n)


@dataclass(frozen=True)
class Reduce:
    """Statistics of (B, T) tensors over the tokens in ``mask``.

    Results are scalars, or (B, 1) for ``scope="response"``, so that they broadcast against (B, T). ``rollout=`` takes the
    recorded values of the whole rollout (``tokens.rollout_entropy``), which ``scope="rollout"`` needs.
    """

    mask: Tensor

    def sum(self, x: Tensor, scope: Scope) -> Tensor:
        """Sum over the tokens of the scope; ``rollout`` is not known for an arbitrary tensor."""
        masked = x.detach() * self.mask
        if scope == "response":
            return masked.sum(-1, keepdim=True)
        if scope == "micro":
            return masked.sum()
        if scope == "world":
            return all_sum(masked.sum())
        raise _no_rollout("sum")

    def count(self, scope: Scope) -> Tensor:
        """Number of trainable tokens in the scope."""
        return self.sum(torch.ones_like(self.mask, dtype=torch.float32), scope)

    def mean(self, x: Tensor, scope: Scope) -> Tensor:
        """Mean over the tokens of the scope; 0 when there are none."""
        return self.sum(x, scope) / self.count(scope).clamp(min=1.0)

    def max(self, x: Tensor, scope: Scope) -> Tensor:
        """Largest value in the scope; -inf when there is none."""
        masked = x.detach().masked_fill(~self.mask, -math.inf)
        if scope == "response":
            empty = masked.new_full((len(masked), 1), -math.inf)
            return masked.amax(-1, keepdim=True) if masked.shape[1] else empty
        if scope == "rollout":
            raise _no_rollout("max")
        local = masked.max() if masked.numel() else masked.new_full((), -math.inf)
        return gather(local[None])[0].max() if scope == "world" else local

    def min(self, x: Tensor, scope: Scope) -> Tensor:
        """Smallest value in the scope; +inf when there is none."""
        return -self.max(-x, scope)

    def quantile(self, x: Tensor, q: float, scope: Scope, rollout: Tensor | None = None) -> Tensor:
        """Linearly interpolated ``q``-quantile; NaN when the scope is empty, so that ``x >= quantile`` keeps nothing."""
        x = _real(x)
        if scope == "response":
            rows = x.masked_fill(~self.mask, math.nan)
            if rows.numel() == 0:
                return rows.new_full((rows.shape[0], 1), math.nan)
            if rows.numel() <= _QUANTILE_LIMIT:
                return torch.nanquantile(rows, q, dim=-1, keepdim=True)
            return torch.stack([quantile(r[m], q) for r, m in zip(rows, self.mask, strict=True)])[:, None]
        return quantile(self._pool(x, scope, rollout)[0], q)

    def topk(self, x: Tensor, fraction: float, scope: Scope, rollout: Tensor | None = None) -> Tensor:
        """(B, T) bool: the ``count_kept(n, fraction)`` largest tokens of the scope, the earlier one first among ties.

        ``scope="rollout"`` keeps every token at or above the k-th largest recorded value, ties included.
        """
        x = _real(x)
        if scope == "response":
            order = x.masked_fill(~self.mask, -math.inf).argsort(dim=-1, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[1], device=x.device).expand_as(x))
            return (place < count_kept(self.mask.sum(-1, keepdim=True), fraction)) & self.mask
        pool, own = self._pool(x, scope, rollout)
        k = int(count_kept(pool.numel(), fraction))
        if k == 0:
            return torch.zeros_like(self.mask)
        if scope == "rollout":
            return (x >= pool.topk(k).values[-1]) & self.mask
        chosen = torch.zeros_like(pool, dtype=torch.bool)
        chosen[pool.argsort(descending=True, stable=True)[:k]] = True
        return torch.zeros_like(self.mask).masked_scatter(self.mask, chosen[own])

    def _pool(self, x: Tensor, scope: Scope, rollout: Tensor | None) -> tuple[Tensor, slice]:
        local = x[self.mask]
        if scope == "micro":
            return local, slice(0, local.numel())
        if scope == "world":
            return gather(local)
        if rollout is None:
            raise _no_rollout("quantile")
        return _real(rollout), slice(0, 0)


def _real(x: Tensor) -> Tensor:
    """Quantiles are taken in fp32, or fp64 where the input is: bf16 has too few digits to rank entropies."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _no_rollout(what: str) -> ValueError:
    return ValueError(
        f'{what} over scope="rollout" needs values recorded for the whole rollout; hand in rollout=tokens.rollout_entropy '
        'and list "rollout_entropy" in needs, or use response, micro or world.'
    )
