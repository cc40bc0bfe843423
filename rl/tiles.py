"""The tiles of the LM head: a few tokens against a slab of the vocabulary. The formulas are those of ``rl.head``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)
# Tokens and words of a tile. On a CPU its 4 MiB in fp32 stay in the cache of a core; elsewhere launches should be few (not measured).
TILE, WIDE_TILE = (512, 2048), (4096, 16384)
_NO_LOGIT = -3e38  # stands for -inf, so that 0 * it is 0
_LOWEST = -1e15  # where a running maximum starts: finite, so that a difference to it times 0 is 0


Extra = Literal["rank", "top1_logp", "margin", "varentropy", "topk_mass", "entropy_t1"]
EXTRAS: tuple[Extra, ...] = ("rank", "top1_logp", "margin", "varentropy", "topk_mass", "entropy_t1")


class LogitRule(NamedTuple):
    """How a model turns products into logits: ``softcap tanh(scale (h w + b) / softcap) / temperature``."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


def spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def tile_of(hidden: Tensor) -> tuple[int, int]:
    """Tokens and words of a tile on the device of ``hidden``."""
    return TILE if hidden.device.type == "cpu" else WIDE_TILE


class Tiles:
    """Base-2 logits of a few tokens against a slab of the vocabulary, in buffers that are used again and again."""

    def __init__(self, hidden: Tensor, rule: LogitRule, tokens: int, vocab: int):
        self.hidden, self.rule = hidden, rule
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        half = hidden.dtype != self.dtype
        self.wide = half and hidden.is_cuda  # the product itself gives fp32
        self._size = min(tokens, len(hidden)) * vocab
        self._flat: dict[str, Tensor] = {}
        self._half = half and not self.wide

    def buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._flat:
            self._flat[name] = self.hidden.new_empty(self._size, dtype=dtype or self.dtype)
        return self._flat[name][: shape[0] * shape[1]].view(shape)

    def logits(
        self, rows: slice, weight: Tensor, bias: Tensor | None, out: Tensor, slope: Tensor | None = None
    ) -> None:
        """Write y = log2(e) logit to ``out``; with a softcap also its slope ``1 - tanh^2`` to ``slope``."""
        h = self.hidden[rows]
        if self._half:
            rounded = self.buffer("rounded", tuple(out.shape), self.hidden.dtype)
            torch.mm(h, weight.t(), out=rounded)
            out.copy_(rounded)
        elif self.wide:
            torch.mm(h, weight.t(), out_dtype=self.dtype, out=out)
        else:
            torch.mm(h, weight.t(), out=out)
        if bias is not None:
            out.add_(bias).clamp_(min=_NO_LOGIT)
        temperature, scale, softcap = self.rule
        if softcap is not None:
            out.mul_(scale / softcap).tanh_()
            if slope is not None:
                torch.mul(out, out, out=slope).neg_().add_(1.0)
            scale = softcap
        out.mul_(scale / (LN2 * temperature))

    def slabs(self, weight: Tensor, bias: Tensor | None, size: int) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        for start, end in spans(len(weight), size):
            part = None if bias is None else bias[start:end].to(self.dtype)
            yield start, end, weight[start:end].to(self.hidden.dtype), part


class Stats(NamedTuple):
    logp: Tensor
    entropy: Tensor
    log_z: Tensor  # base 2
    extra: dict[str, Tensor]


class Moments:
    """The running sums of all tokens over the vocabulary."""

    def __init__(self, tiles: Tiles, extras: Sequence[Extra], top_k: int, y_target: Tensor | None):
        n = len(tiles.hidden)

        def sums(wanted: bool = True, start: float = 0.0, columns: tuple[int, ...] = ()) -> Tensor | None:
            return tiles.hidden.new_full((n, *columns), start, dtype=tiles.dtype) if wanted else None

        self.extras, self.top_k, self.temperature = extras, top_k, tiles.rule.temperature
        self.m = sums(start=_LOWEST)
        self.s0, self.s1, self.s2 = sums(), sums(), sums("varentropy" in extras)
        self.hot0, self.hot1 = sums("entropy_t1" in extras), sums("entropy_t1" in extras)  # S0, S1 at temperature 1
        self.y_target = sums() if y_target is None else y_target
        self.above = None if y_target is None else sums()
        k = max(top_k if "topk_mass" in extras else 0, 2 if "margin" in extras else 0)
        self.top = sums(k > 0, _LOWEST, (k,))

    def add(self, rows: slice, y: Tensor, e: Tensor, targets: Tensor, start: int) -> None:
        """Fold in the logits ``y`` of ``rows`` from vocabulary id ``start`` on; ``y`` and the scratch ``e`` are used up."""
        inside = ((targets >= start) & (targets < start + y.shape[1])).nonzero().squeeze(1)
        column = targets[inside] - start
        if self.above is not None:
            torch.gt(y, self.y_target[rows, None], out=e)
            e[inside, column] = 0.0  # the token itself, whatever the rounding
            self.above[rows] += e.sum(-1)
        else:
            self.y_target[rows][inside] = y[inside, column]  # a view: rows is a slice
        if self.top is not None:
            self.top[rows] = torch.cat([self.top[rows], y], 1).topk(self.top.shape[1]).values
        before = self.m[rows].clone()
        m = torch.maximum(before, y.amax(-1))
        delta, self.m[rows] = m - before, m
        y.sub_(m[:, None])
        if self.hot0 is not None:
            t = self.temperature
            torch.exp2(torch.mul(y, t, out=e), out=e)
            _shift(self.hot0[rows], self.hot1[rows], None, delta * t)
            self.hot0[rows] += e.sum(-1)
            self.hot1[rows] += e.mul_(y).sum(-1) * t
        torch.exp2(y, out=e)
        s2 = None if self.s2 is None else self.s2[rows]
        _shift(self.s0[rows], self.s1[rows], s2, delta)
        self.s0[rows] += e.sum(-1)
        self.s1[rows] += e.mul_(y).sum(-1)
        if s2 is not None:
            s2 += e.mul_(y).sum(-1)

    def finish(self) -> Stats:
        log_s0, mean = self.s0.log2(), self.s1 / self.s0
        log_z = self.m + log_s0
        logp = (LN2 * (self.y_target - log_z)).masked_fill(self.y_target <= _NO_LOGIT, -math.inf)
        extra: dict[str, Tensor] = {}
        for name in self.extras:
            if name == "rank":
                extra[name] = self.above.long() + 1
            elif name == "top1_logp":
                extra[name] = -LN2 * log_s0
            elif name == "margin":
                extra[name] = LN2 * (self.top[:, 0] - self.top[:, 1])
            elif name == "varentropy":
                extra[name] = LN2**2 * (self.s2 / self.s0 - mean * mean).clamp(min=0)
            elif name == "topk_mass":
                extra[name] = (self.top[:, : self.top_k] - log_z[:, None]).exp2().sum(-1)
            elif name == "entropy_t1":
                extra[name] = LN2 * (self.hot0.log2() - self.hot1 / self.hot0)
        return Stats(logp, LN2 * (log_s0 - mean), log_z, extra)


def _shift(s0: Tensor, s1: Tensor, s2: Tensor | None, delta: Tensor) -> None:
    """Move the sums from their old maximum to one ``delta`` higher, in place."""
    factor = torch.exp2(-delta)
    if s2 is not None:
        s2.copy_((s2 - 2 * delta * s1 + delta * delta * s0) * factor)
    s1.copy_((s1 - delta * s0) * factor)
    s0.mul_(factor)


def target_logits(tiles: Tiles, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """(N,) base-2 logits of the targets, by one row product each."""
    out = tiles.hidden.new_empty(len(targets), dtype=tiles.dtype)
    for start, end in spans(len(targets), tile_of(tiles.hidden)[0]):
        ids = targets[start:end]
        w = weight[ids].to(tiles.hidden.dtype).to(tiles.dtype)
        dot = (tiles.hidden[start:end].to(tiles.dtype) * w).sum(-1)
        if tiles.hidden.dtype != tiles.dtype and not tiles.wide:
            dot = dot.to(tiles.hidden.dtype).to(tiles.dtype)  # as the tile's own logits
        if bias is not None:
            dot = (dot + bias[ids].to(tiles.dtype)).clamp(min=_NO_LOGIT)
        temperature, scale, softcap = tiles.rule
        if softcap is not None:
            dot, scale = (dot * (scale / softcap)).tanh(), softcap
        out[start:end] = dot * (scale / (LN2 * temperature))
    return out


class LogitGradient(NamedTuple):
    """What turns a tile's logits into their gradient ``p (a + b log2 p) + onehot at the target``."""

    targets: Tensor
    log_z: Tensor
    a: Tensor
    b: Tensor | None
    onehot: Tensor | None

    @classmethod
    def of(cls, targets, log_z, entropy, g_logp, g_entropy, rule: LogitRule) -> LogitGradient:
        slope = rule.scale / rule.temperature
        onehot = None if g_logp is None else g_logp * slope
        a = torch.zeros_like(entropy) if onehot is None else -onehot
        if g_entropy is None:
            return cls(targets, log_z, a, None, onehot)
        return cls(targets, log_z, a - slope * g_entropy * entropy, -slope * LN2 * g_entropy, onehot)

    def fill(self, rows: slice, y: Tensor, scratch: Tensor | None, slope: Tensor | None, start: int) -> None:
        """Base-2 logits ``y`` from vocabulary id ``start`` on become the gradient of the products, in place."""
        y.sub_(self.log_z[rows, None])
        if self.b is None:
            torch.exp2(y, out=y).mul_(self.a[rows, None])
        else:
            torch.exp2(y, out=scratch)
            y.mul_(self.b[rows, None]).add_(self.a[rows, None]).mul_(scratch)
        if self.onehot is not None:
            column = self.targets[rows] - start
            inside = ((column >= 0) & (column < y.shape[1])).nonzero().squeeze(1)
            y[inside, column[inside]] += self.onehot[rows][inside]
        if slope is not None:
            y.mul_(slope)


class Gradients:
    """Sums the gradients of hidden, weight and bias over slabs of the vocabulary."""

    def __init__(self, tiles: Tiles, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]):
        self.h, self.dtype, self.wide = tiles.hidden, tiles.dtype, tiles.wide
        self.hidden = torch.zeros(self.h.shape, dtype=tiles.dtype, device=self.h.device) if needs[0] else None
        self.weight = torch.empty_like(weight) if needs[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

    def add(self, dz: Tensor, w: Tensor, v0: int, rows: slice = slice(None), first: bool = True) -> None:
        """``dz`` (rows, slab) in the dtype of the products; ``first``: the slab of the weight has no gradient yet."""
        v1 = v0 + dz.shape[1]
        if self.hidden is not None:
            if w.dtype == self.dtype:
                self.hidden[rows].addmm_(dz, w)
            else:
                self.hidden[rows] += torch.mm(dz, w, out_dtype=self.dtype) if self.wide else torch.mm(dz, w)
        if self.weight is not None:
            slab, h = self.weight[v0:v1], self.h[rows]
            if slab.dtype != dz.dtype:
                product = torch.mm(dz.t(), h)
                slab.copy_(product) if first else slab.add_(product)
            elif first:
                torch.mm(dz.t(), h, out=slab)
            else:
                slab.addmm_(dz.t(), h)
        if self.bias is not None:
            self.bias[v0:v1] += dz.sum(0, dtype=self.dtype)
