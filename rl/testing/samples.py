"""The batch that the laws are tried on, as a plug-in sees it, and what of a signal they compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from rl.contract import Signal, TokenBatch, TokenPlugin
from rl.pipeline import Pipeline
from rl.testing.batch import batch_from_logits, rollout_of

Make = Callable[..., TokenPlugin]  # make() as it is set, make(**neutral) as the identity

GROUP = 2  # completions of a prompt; three to a rank in the law of two ranks, so that one prompt's are on both


def random_batch(
    dtype: torch.dtype = torch.float64, rows: int = 6, columns: int = 9, requires_grad: bool = False
) -> TokenBatch:
    """The same off-policy batch at every call: ragged, with a completion of one token (1), one that is masked whole (2), and one of
    words that were to be expected (5)."""
    logits, old, ids, mask, advantages = _drawn(rows, columns)
    logits = logits.to(dtype).requires_grad_(requires_grad)
    return batch_from_logits(
        logits,
        ids,
        mask,
        advantages.to(dtype),
        old_logits=old.to(dtype),
        ref_logits=(logits.detach() * 0.9),
        reward=(torch.arange(rows) % 3 > 0).double(),  # prompts with two right answers, with one and with none
    )


def random_logits(dtype: torch.dtype = torch.float64, rows: int = 6, columns: int = 9) -> Tensor:
    """(rows, columns, V) the current policy's logits of :func:`random_batch`, for the loss where a signal scales them."""
    return _drawn(rows, columns)[0].to(dtype)


def _drawn(rows: int, columns: int, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, old logits, ids, mask and advantages."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, columns, vocabulary, generator=g, dtype=torch.float64)
    old = logits + 0.3 * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (rows, columns), generator=g)
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    lengths[1:2] = 1
    mask = torch.arange(columns) < lengths[:, None]
    mask[2:3] = False
    certain = 12 * functional.one_hot(ids[5:6], vocabulary)
    logits[5:6] += certain
    old[5:6] += certain
    return logits, old, ids, mask, torch.randn(rows, generator=g, dtype=torch.float64)


def rows_of(tokens: TokenBatch, index: Tensor | slice) -> TokenBatch:
    """The batch of these completions; the recorded rollout stays whole."""
    rowwise = {f: v[index] for f, v in tensors_of(tokens).items() if f != "rollout_entropy"}
    return replace(tokens, **rowwise, noted={key: value[index] for key, value in tokens.noted.items()})


def tensors_of(tokens: TokenBatch) -> dict[str, Tensor]:
    """The fields of a batch that are tensors, by name."""
    return {f: v for f in tokens.__dataclass_fields__ if isinstance(v := getattr(tokens, f), Tensor)}


def batch_for(make: Make, dtype: torch.dtype = torch.float64, rows: int = 6, requires_grad: bool = False) -> TokenBatch:
    """:func:`random_batch` with what the plug-in notes of it."""
    return noted(make, random_batch(dtype, rows, requires_grad=requires_grad))


def noted(make: Make, tokens: TokenBatch) -> TokenBatch:
    """The batch with what a fresh plug-in notes of it as a rollout of pairs."""
    plugin = make()
    if not hasattr(plugin, "at_rollout"):
        return tokens
    return replace(tokens, noted=plugin.at_rollout(rollout_of(tokens, GROUP)))


def through(pipeline: Pipeline, tokens: TokenBatch) -> Signal:
    """The signal of a pipeline that saw the batch as a rollout of pairs first."""
    return pipeline(replace(tokens, noted=pipeline.at_rollout(rollout_of(tokens, GROUP))))


def scale_of(signal: Signal) -> Tensor:
    """(B, T) what the logits are multiplied by."""
    return torch.ones_like(signal.weight) if signal.logit_scale is None else signal.logit_scale


def of_tokens(signal: Signal) -> Tensor:
    """(B, T, 2) what decides each token's policy loss: its effective advantage and the scale of its logits."""
    return torch.stack([signal.effective, scale_of(signal)], -1)
