"""Masked statistics over a scope. The only file that knows ``torch.distributed``; every result is detached.

Scopes: ``response`` one completion, ``micro`` this micro-batch on this rank, ``world`` the micro-batch on all ranks, ``rollout``
the whole generation batch on all ranks (only where the recorded values are handed in). For the last two every rank must ask, with
tokens or without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Scope = Literal["response", "micro", "world", "rollout"]
SCOPES: tuple[Scope, ...] = ("response", "micro", "world", "rollout")

_QUANTILE_LIMIT = 2**24  # torch.quantile refuses more elements
_RADIX = 11  # bits of a digit in radix selection


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; every rank must call it. ``device``: where the ranks' collectives work."""
    return bool(all_sum(torch.tensor(float(flag), device=device)) > 0)


def from_first(value: Any) -> Any:
    """The first rank's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def join(rank: int, size: int, meeting: Path) -> None:
    """Make this process one of a group over gloo; the others name the same file, which is not there yet."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    dist.barrier()  # a rank that is done and gone at once would break off the others' connecting


def leave() -> None:
    """End this process's part in the group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks; every rank must call it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum of ``x`` over ranks; every rank must call it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def per_rank(count: Tensor) -> Tensor:
    """``count`` of all ranks over their number: a sum divided by it is, averaged over ranks as gradients are, the mean over all
    that is counted, also where ranks hold unequal numbers or none. Every rank must call it."""
    return all_sum(count) / world_size()


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


def union(names: Iterable[str], device: torch.device) -> list[str]:
    """The sorted names that any rank has, the same list on all of them; every rank must call it, also with none."""
    names = set(names)
    if world_size() > 1:
        text = bytearray("".join(f"{name}\n" for name in sorted(names)).encode())
        own = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        names = set(bytes(gather(own.to(device))[0].tolist()).decode().splitlines())
    return sorted(names)


def select(values: Tensor, k: int, everywhere: bool) -> Tensor:
    """The ``k``-th smallest (from 0) of 1-D ``values``, of all ranks' values if ``everywhere``: exact, any number of them.

    Radix selection on the ordered bits: one all-reduced histogram of 2048 bins for every 11 bits, whatever the number of tokens.
    """
    bits = torch.finfo(values.dtype).bits
    raw = values.detach().contiguous().view(torch.int32 if bits == 32 else torch.int64).long()
    keys = torch.where(raw < 0, raw ^ ((1 << (bits - 1)) - 1), raw)  # now ordered as the numbers are
    found, shift = 0, bits
    while shift:
        width = min(_RADIX, shift)
        shift -= width
        offset = 1 << (width - 1) if shift + width == bits else 0  # the first digit carries the sign
        digit = (keys >> shift) & ((1 << width) - 1) if not offset else (keys >> shift) + offset
        counts = torch.bincount(digit, minlength=1 << width)
        below = (all_sum(counts) if everywhere else counts).cumsum(0)
        bucket = int(torch.searchsorted(below, k, right=True))
        k -= int(below[bucket - 1]) if bucket else 0
        keys = keys[digit == bucket]
        found = (found << width) + bucket - offset
    raw = found ^ ((1 << (bits - 1)) - 1) if found < 0 else found
    return torch.tensor(raw, device=values.device).to(torch.int32 if bits == 32 else torch.int64).view(values.dtype)


def quantile(values: Tensor, q: float, everywhere: bool = False) -> Tensor:
    """The linearly interpolated ``q``-quantile of 1-D ``values``, of all ranks' if ``everywhere``; NaN when there are none."""
    everywhere = everywhere and world_size() > 1
    n = _total(values, everywhere)
    if n == 0:
        return values.new_full((), math.nan)
    if not everywhere and n <= _QUANTILE_LIMIT:
        return torch.quantile(values, q)
    # in the dtype of the values, as torch.quantile has it, while that dtype still counts one by one
    dtype = values.dtype if n <= _QUANTILE_LIMIT else torch.float64
    position = torch.tensor(q, dtype=dtype) * (n - 1)
    low = int(position)
    lower = select(values, low, everywhere)
    upper = select(values, min(low + 1, n - 1), everywhere)
    return torch.lerp(lower, upper, (position - low).to(values))


def _total(values: Tensor, everywhere: bool) -> int:
    n = torch.tensor(values.numel(), device=values.device)
    return int(all_sum(n) if everywhere else n)


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
    this rank's recorded values of the whole rollout (``tokens.rollout_entropy``), which ``scope="rollout"`` needs. Thresholds of
    ``world`` and ``rollout`` are exact, and cost the same communication however many tokens there are.
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
        values, everywhere = self._pool(x, scope, rollout)
        return quantile(values, q, everywhere)

    def topk(self, x: Tensor, fraction: float, scope: Scope, rollout: Tensor | None = None) -> Tensor:
        """(B, T) bool: the ``count_kept(n, fraction)`` largest tokens of the scope, the earlier one first among ties.

        ``scope="rollout"`` keeps every token at or above the k-th largest recorded value, ties included.
        """
        if scope == "response":
            return self.largest(x, count_kept(self.mask.sum(-1, keepdim=True), fraction), scope)
        values, everywhere = self._pool(_real(x), scope, rollout)
        n = _total(values, everywhere)
        k = count_kept(n, fraction)
        if scope != "rollout":
            return self.largest(x, k, scope)
        return (_real(x) >= select(values, n - int(k), everywhere)) & self.mask if k else torch.zeros_like(self.mask)

    def largest(self, x: Tensor, k: Tensor | int, scope: Scope) -> Tensor:
        """(B, T) bool: the ``k`` largest tokens of the scope or all where there are fewer, the earlier one first among ties.

        ``k`` may be (B, 1) for ``scope="response"``; for ``world`` it is the same on every rank.
        """
        x = _real(x)
        if scope == "response":
            order = x.masked_fill(~self.mask, -math.inf).argsort(dim=-1, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[1], device=x.device).expand_as(x))
            return (place < k) & self.mask
        values, everywhere = self._pool(x, scope, None)
        n = _total(values, everywhere)
        k = min(int(k), n)
        if k == 0:
            return torch.zeros_like(self.mask)
        last = select(values, n - k, everywhere)
        kept = values > last
        ties = (values == last).nonzero().squeeze(1)
        missing = k - _total(values[kept], everywhere)
        if everywhere:  # ranks come in order
            counts, own = gather(torch.tensor([ties.numel()], device=ties.device))
            missing -= int(counts[: own.start].sum())
        kept[ties[: max(missing, 0)]] = True
        return torch.zeros_like(self.mask).masked_scatter(self.mask, kept)

    def _pool(self, x: Tensor, scope: Scope, rollout: Tensor | None) -> tuple[Tensor, bool]:
        """This rank's values of the scope, and whether the other ranks' belong to it."""
        if scope != "rollout":
            return x[self.mask], scope == "world" and world_size() > 1
        if rollout is None:
            raise _no_rollout("quantile")
        return _real(rollout), world_size() > 1


def _real(x: Tensor) -> Tensor:
    """Quantiles are taken in fp32, or fp64 where the input is: bf16 has too few digits to rank entropies."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _no_rollout(what: str) -> ValueError:
    return ValueError(
        f'{what} over scope="rollout" needs values recorded for the whole rollout; hand in rollout=tokens.rollout_entropy '
        'and list "rollout_entropy" in needs, or use response, micro or world.'
    )
