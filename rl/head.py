"""The LM head as one operation: hidden states to logp and entropy of every token, without the (tokens, vocabulary) logits.

The vocabulary is the outer loop and the tokens the inner one, so the weight is read once and each slab of its gradient is one
product. Everything is in base 2 and about the running maximum: with y = log2(e) logit, m = max y and d = y - m,

    S0 = sum 2^d, S1 = sum 2^d d, S2 = sum 2^d d^2
    logp = ln2 (y_target - m - log2 S0)      H = ln2 (log2 S0 - S1 / S0)      varentropy = ln2^2 (S2 / S0 - (S1 / S0)^2)

The backward computes the tiles again, for those tokens only whose incoming gradient is not zero: a mask, a zero weight or a
zero advantage saves its share of the work without asking. With g the gradient of logp and e that of the entropy,

    d loss / d logit_v = g (1[v = target] - p_v) - e p_v (ln p_v + H)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from rl import kernel
from rl.tiles import (
    EXTRAS,
    Extra,
    Gradients,
    LogitGradient,
    LogitRule,
    Moments,
    Stats,
    Tiles,
    spans,
    target_logits,
    tile_of,
)

_SLAB = 64 << 20  # bytes of the logit gradients of all live tokens against one slab of the vocabulary
_KEPT = 256 << 20  # bytes of logits kept when the gradient is formed in the forward
_PLAIN = LogitRule()


class HeadStats(NamedTuple):
    """Per token, (N,), in nats, at the temperature; everything but logp and entropy is without gradient.

    rank: ``1 + #{v != target : logit_v > logit_target}``, so ties share the best rank. margin: top-1 minus top-2 logp.
    topk_mass: probability of the k most likely tokens. entropy_t1: entropy at temperature 1.
    """

    logp: Tensor
    entropy: Tensor
    rank: Tensor | None = None
    top1_logp: Tensor | None = None
    margin: Tensor | None = None
    varentropy: Tensor | None = None
    topk_mass: Tensor | None = None
    entropy_t1: Tensor | None = None


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rule: LogitRule = _PLAIN,
    extras: Sequence[Extra] = (),
    top_k: int = 10,
    gradient: Tensor | None = None,
    gathered: Callable[..., AbstractContextManager] = lambda *parameters: nullcontext(),
) -> HeadStats:
    """Logp of the targets and entropy of the distributions, both with exact gradient.

    Products are in the autocast dtype, else in that of ``hidden``; sums, statistics and the gradient of ``hidden`` in fp32
    (fp64 for fp64 inputs). Half-precision products give fp32 logits on CUDA, rounded ones on a CPU, which has no such product.

    Args:
        hidden: (N, D). weight: (V, D). targets: (N,) token ids. bias: (V,); -inf excludes a token.
        extras: which further statistics. top_k: for ``topk_mass``.
        gradient: (N,) what the gradient of logp is going to be up to one common factor, where that is known beforehand: the
            forward then forms the gradients while it has the logits, 3 products instead of 4. A backward that brings
            something else, or a gradient of the entropy, is computed in the usual way: never wrong, only slower.
        gathered: a context over (weight, bias) in which they are whole, entered in the forward and again in the backward (ZeRO-3).
    """
    call = _Call(rule, tuple(e for e in EXTRAS if e in extras), top_k, gathered)  # one argument, as autograd wants them
    return HeadStats(*_Head.apply(hidden, weight, bias, targets, gradient, call))


class _Call(NamedTuple):
    rule: LogitRule
    extras: tuple[Extra, ...]
    top_k: int
    gathered: Callable[..., AbstractContextManager]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, gradient, call: _Call):
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.call, ctx.compute, ctx.formed = call, compute, None
        needs = ctx.needs_input_grad[:3]
        ctx.kernel = None
        with call.gathered(weight, bias):  # every rank, whichever way its own tokens take
            if kernel.usable(hidden):
                stats, ctx.kernel = kernel.statistics(hidden, weight, bias, targets, call.rule)
                if call.extras:
                    stats = stats._replace(extra=_statistics(hidden.to(compute), weight, bias, targets, call).extra)
            elif gradient is not None and any(needs) and _fits(gradient, weight, compute):
                stats, ctx.formed = _form(hidden, weight, bias, targets, gradient, call, compute, needs)
            else:
                stats = _statistics(hidden.to(compute), weight, bias, targets, call)
        ctx.save_for_backward(hidden, weight, bias, targets, gradient, stats.log_z, stats.entropy)
        extras = [stats.extra.get(name) for name in EXTRAS]
        ctx.mark_non_differentiable(*(e for e in extras if e is not None))
        return stats.logp, stats.entropy, *extras

    @staticmethod
    def backward(ctx, g_logp, g_entropy, *_):
        hidden, weight, bias, targets, gradient, log_z, entropy = ctx.saved_tensors
        formed, ctx.formed = ctx.formed, None
        if formed is not None and (factor := _common_factor(gradient, g_logp, g_entropy)) is not None:
            with ctx.call.gathered(weight, bias):  # not needed here, but by the ranks that have to compute
                return *(None if f is None else f.mul_(factor) for f in formed), None, None, None
        incoming = [None if g is None else g.to(log_z.dtype) for g in (g_logp, g_entropy)]
        live = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
        for g in incoming:
            live |= g != 0 if g is not None else False
        rows = live.nonzero().squeeze(1)
        g_logp, g_entropy = (None if g is None else g[rows] for g in incoming)
        needs = ctx.needs_input_grad[:3]
        with ctx.call.gathered(weight, bias):
            if ctx.kernel is not None:
                saved = (hidden[rows], weight, bias, targets[rows], log_z[rows], entropy[rows])
                grads = kernel.backward(ctx.kernel, saved, g_logp, g_entropy, needs)
            else:
                pulled = LogitGradient.of(targets[rows], log_z[rows], entropy[rows], g_logp, g_entropy, ctx.call.rule)
                grads = _backward(hidden[rows].to(ctx.compute), weight, bias, pulled, ctx.call.rule, needs)
        if grads[0] is not None:
            grads[0] = torch.zeros_like(hidden).index_copy_(0, rows, grads[0].to(hidden.dtype))
        return *grads, None, None, None


def _statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call) -> Stats:
    """One pass over the vocabulary; ``hidden`` in the dtype of the products."""
    n_tokens, n_vocab = tile_of(hidden)
    tiles = Tiles(hidden, call.rule, n_tokens, n_vocab)
    y_target = target_logits(tiles, weight, bias, targets) if "rank" in call.extras else None
    moments = Moments(tiles, call.extras, call.top_k, y_target)
    for v0, v1, w, b in tiles.slabs(weight, bias, n_vocab):
        for r0, r1 in spans(len(hidden), n_tokens):
            rows, shape = slice(r0, r1), (r1 - r0, v1 - v0)
            y = tiles.buffer("y", shape)
            tiles.logits(rows, w, b, y)
            moments.add(rows, y, tiles.buffer("e", shape), targets[rows], v0)
    return moments.finish()


def _backward(
    hidden, weight, bias, pulled: LogitGradient, rule: LogitRule, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of hidden (in fp32), weight and bias for tokens that all are live; the tiles are computed again."""
    n = len(hidden)
    if n == 0:
        zeros = (
            torch.zeros_like(x) if x is not None and need else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        )
        return list(zeros)
    n_tokens, n_vocab = tile_of(hidden)
    width = max(512, min(n_vocab, _SLAB // (n * hidden.element_size())))
    tiles = Tiles(hidden, rule, n_tokens, width)
    dz_all = hidden.new_empty(n * width)
    out = Gradients(tiles, weight, bias, needs)
    direct = hidden.dtype == tiles.dtype  # the tile is computed where its gradient will stand
    for v0, v1, w, b in tiles.slabs(weight, bias, width):
        dz = dz_all[: n * (v1 - v0)].view(n, v1 - v0)
        for r0, r1 in spans(n, n_tokens):
            rows, shape = slice(r0, r1), (r1 - r0, v1 - v0)
            y = dz[rows] if direct else tiles.buffer("y", shape)
            slope = None if rule.softcap is None else tiles.buffer("slope", shape)
            tiles.logits(rows, w, b, y, slope)
            pulled.fill(rows, y, None if pulled.b is None else tiles.buffer("e", shape), slope, v0)
            if not direct:
                dz[rows].copy_(y)
        out.add(dz, w, v0)
    return [out.hidden, out.weight, out.bias]


def _fits(gradient: Tensor, weight: Tensor, compute: torch.dtype) -> bool:
    """Half-precision gradients of the weight must not be summed over blocks of tokens: they would round at each."""
    return compute in (torch.float32, torch.float64) or int((gradient != 0).sum()) <= _KEPT // (4 * len(weight))


def _form(hidden, weight, bias, targets, gradient, call: _Call, compute: torch.dtype, needs):
    """Statistics of all tokens, and the gradients for an incoming ``gradient`` of logp, formed block by block of tokens."""
    live = (gradient != 0).nonzero().squeeze(1)
    rest = (gradient == 0).nonzero().squeeze(1)
    h, t, g = hidden[live].to(compute), targets[live], gradient[live]
    block = max(1, _KEPT // (4 * len(weight)))
    tiles = Tiles(h, call.rule, *tile_of(h))
    g = g.to(tiles.dtype)
    out = Gradients(tiles, weight, bias, needs)
    if not len(live) and out.weight is not None:
        out.weight.zero_()
    parts = [_statistics(hidden[rest].to(compute), weight, bias, targets[rest], call)]
    for r0, r1 in spans(len(live), block):
        parts.append(_form_block(tiles, weight, bias, t, g, slice(r0, r1), call, out, first=r0 == 0))
    order = torch.cat([rest, live]).argsort()
    stats = Stats(*(torch.cat(p)[order] for p in zip(*(p[:3] for p in parts), strict=True)), {})
    stats.extra.update({name: torch.cat([p.extra[name] for p in parts])[order] for name in call.extras})
    if out.hidden is not None:
        out.hidden = torch.zeros_like(hidden).index_copy_(0, live, out.hidden.to(hidden.dtype))
    return stats, (out.hidden, out.weight, out.bias)


def _form_block(tiles: Tiles, weight, bias, targets, g, rows: slice, call: _Call, out: Gradients, first: bool) -> Stats:
    n = rows.stop - rows.start
    t = targets[rows]
    n_tokens, n_vocab = tile_of(tiles.hidden)
    part = Tiles(tiles.hidden[rows], call.rule, n_tokens, n_vocab)
    y_target = target_logits(part, weight, bias, t) if "rank" in call.extras else None
    moments = Moments(part, call.extras, call.top_k, y_target)
    kept, slopes = [], []
    for v0, v1, w, b in part.slabs(weight, bias, n_vocab):
        kept.append(part.hidden.new_empty((n, v1 - v0), dtype=part.dtype))
        slopes.append(torch.empty_like(kept[-1]) if call.rule.softcap is not None else None)
        for r0, r1 in spans(n, n_tokens):
            inner, shape = slice(r0, r1), (r1 - r0, v1 - v0)
            part.logits(inner, w, b, kept[-1][inner], None if slopes[-1] is None else slopes[-1][inner])
            y = part.buffer("y", shape)
            y.copy_(kept[-1][inner])
            moments.add(inner, y, part.buffer("e", shape), t[inner], v0)
    stats = moments.finish()
    pulled = LogitGradient.of(t, stats.log_z, stats.entropy, g[rows], None, call.rule)
    for i, (v0, _, w, _) in enumerate(part.slabs(weight, None, n_vocab)):
        dz, kept[i] = kept[i], None
        pulled.fill(slice(None), dz, None, slopes[i], v0)
        out.add(dz.to(w.dtype), w, v0, rows, first)
    return stats


def _common_factor(gradient: Tensor, g_logp: Tensor | None, g_entropy: Tensor | None) -> Tensor | None:
    """The number c with ``g_logp = c gradient`` to rounding and no gradient of the entropy; None when there is none."""
    if g_logp is None or (g_entropy is not None and bool((g_entropy != 0).any())):
        return None
    if not gradient.numel():
        return gradient.new_ones(())
    at = gradient.abs().argmax()
    factor = g_logp[at] / gradient[at] if bool(gradient[at] != 0) else gradient.new_zeros(())
    expected = gradient * factor
    close = bool(((g_logp - expected).abs() <= 2e-6 * expected.abs()).all())
    return factor if close else None
