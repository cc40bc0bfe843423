"""TRL's Triton kernel for the head on GPUs, run forward on the tokens given and backward on the live ones only.

TRL's function computes the backward of every row it was given. Its two halves are called here with a context of our own, so
that the rows in between can be chosen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from rl.tiles import LogitRule, Stats

_VOCAB = 32768  # width of a tile, TRL's own
_LN2 = math.log(2.0)


class _Context:
    """What TRL's function asks of an autograd context."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def usable(hidden: Tensor) -> bool:
    """Whether the kernel runs where ``hidden`` is."""
    return hidden.is_cuda


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: LogitRule
) -> tuple[Stats, Any]:
    """Logp, entropy and log Z (base 2) of every token, and what ``backward`` wants to know."""
    ctx = _Context()
    logp, entropy, *_ = ChunkedLogProbFunction.forward(
        ctx, hidden, weight, bias, targets, rule.temperature, _VOCAB, rule.softcap, rule.scale, ("entropy",)
    )
    log_z = ctx.saved_tensors[4]
    ctx.saved_tensors = ()  # autograd keeps the tensors, so that nothing outlives the backward
    return Stats(logp, entropy, log_z / _LN2, {}), ctx


def backward(
    ctx: _Context,
    saved: tuple[Tensor | None, ...],
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias for the tokens in ``saved`` (hidden, weight, bias, targets, log Z, entropy)."""
    hidden, weight, bias, targets, log_z, entropy = saved
    if not len(targets):
        return [
            torch.zeros_like(x) if need and x is not None else None for x, need in zip(saved[:3], needs, strict=True)
        ]
    ctx.saved_tensors, ctx.needs_input_grad = (hidden, weight, bias, targets, log_z * _LN2, entropy), needs
    try:
        return list(ChunkedLogProbFunction.backward(ctx, g_logp, g_entropy)[:3])
    finally:
        ctx.saved_tensors = ()
