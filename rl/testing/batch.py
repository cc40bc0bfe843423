"""For people who write plug-ins: a TokenBatch and a Rollout from plain tensors, and a readable reference loss.

They keep the dtype they are given, so that a method's golden numbers can be tested to 1e-9 in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rl.contract import Rollout, Signal, TokenBatch


def batch_from_logits(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_logits: Tensor | None = None,
    ref_logits: Tensor | None = None,
    temperature: float = 1.0,
    reward: Tensor | None = None,
    group: Tensor | None = None,
    step: int = 0,
    total_steps: int = 1,
) -> TokenBatch:
    """Everything a plug-in may ask for, computed from (B, T, V) logits by the textbook formulas.

    Args:
        logits: current policy; gradients flow to it through logp, entropy and full_kl.
        ids: (B, T) sampled tokens. mask: (B, T) trainable tokens. advantages: (B,) or (B, T).
        old_logits: behaviour policy, default the current one (on-policy). ref_logits: reference policy.
        temperature: of the rollout; all logits are divided by it.
        reward, group: (B,), default zeros and one group.
    """
    ids, mask = ids.long(), mask.bool()
    logp_all = (logits / temperature).log_softmax(-1)
    old_all = logp_all.detach() if old_logits is None else (old_logits / temperature).log_softmax(-1).detach()
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(ids.shape)
    old_entropy = _entropy(old_all)
    kl = ref_logp = None
    if ref_logits is not None:
        ref_all = (ref_logits / temperature).log_softmax(-1).detach()
        ref_logp = _pick(ref_all, ids)
        kl = (logp_all.exp() * (logp_all - ref_all)).sum(-1)
    return TokenBatch(
        mask=mask,
        ids=ids,
        logp=_pick(logp_all, ids),
        old_logp=_pick(old_all, ids),
        entropy=_entropy(logp_all),
        advantages=advantages,
        reward=logits.new_zeros(len(ids)) if reward is None else reward,
        group=torch.zeros(len(ids), dtype=torch.long) if group is None else group,
        step=step,
        total_steps=total_steps,
        temperature=temperature,
        on_policy=old_logits is None,
        old_entropy=old_entropy,
        rank=1 + (logits > logits.gather(-1, ids[..., None])).sum(-1),
        ref_logp=ref_logp,
        full_kl=kl,
        rollout_entropy=old_entropy[mask],
    )


def rollout_of(batch: TokenBatch, group_size: int) -> Rollout:
    """The batch as a rollout of its own, for ``at_rollout``: every ``group_size`` rows are a prompt's completions."""
    return Rollout(
        mask=batch.mask,
        ids=batch.ids,
        reward=batch.reward,
        old_entropy=batch.old_entropy,
        group_size=group_size,
        trained=group_size,
    )


def loss_from_signal(
    batch: TokenBatch,
    signal: Signal,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    logits: Tensor | None = None,
    aggregation: Literal["dapo", "grpo"] = "dapo",
) -> Tensor:
    """The clipped policy loss of the signal plus its penalties: a scalar with gradient.

    ``l_t = -min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)`` with A the effective advantage; ``dapo`` is
    the mean over all trainable tokens, ``grpo`` the mean over completions of each completion's mean. ``logits`` (B, T, V) are
    needed where the signal scales them; r then is of the scaled ones, and 1 in value, since that takes an on-policy run.
    """
    logp, old_logp = batch.logp, batch.old_logp
    if signal.logit_scale is not None:
        scaled = logits / batch.temperature * signal.logit_scale[..., None]
        logp = _pick(scaled.log_softmax(-1), batch.ids)
        old_logp = logp.detach()
    ratio = (logp - old_logp).exp()
    advantage = signal.effective
    per_token = -torch.min(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage) * batch.mask
    if aggregation == "dapo":
        loss = per_token.sum() / batch.mask.sum().clamp(min=1)
    elif aggregation == "grpo":
        loss = (per_token.sum(-1) / batch.mask.sum(-1).clamp(min=1)).mean()
    else:
        raise ValueError(f'aggregation={aggregation!r} is not known. Expected "dapo" or "grpo".')
    return loss + sum(penalty.coef * penalty.mean(batch.mask) for penalty in signal.penalties)


def _pick(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids[..., None]).squeeze(-1)


def _entropy(logp: Tensor) -> Tensor:
    p = logp.exp()
    return -torch.where(p > 0, p * logp, 0.0).sum(-1)  # 0 ln 0 = 0 where a logit is -inf
