"""Hidden states and LM head to per-token statistics that TRL's fused head does not give, without full logits.

TRL's fused head already yields logp and entropy, both with gradient; what is here reads the same hidden states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import add_fused_lm_head

from rl.errors import ConfigError

_TOKENS, _VOCAB = 1024, 16384  # tile sizes: the largest temporary is tokens x vocab in fp32, 64 MiB

# Config fields by which model families scale or cap their logits; a rank does not mind, a divergence does.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


class Scores(NamedTuple):
    """Per completion token: logp of the sampled token and entropy of its distribution, in nats, at the temperature."""

    logp: Tensor
    entropy: Tensor


@contextmanager
def fused_head(model: nn.Module, temperature: float) -> Iterator[None]:
    """Within the context ``model(..., labels=..., fused_lm_head=True)`` returns logp and entropy at ``temperature``."""
    patched = model.__dict__.get("forward")
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    try:
        yield
    finally:
        if patched is None:
            del model.forward
        else:
            model.forward = patched


@torch.no_grad()
def score(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, n_completion: int, temperature: float = 1.0
) -> Scores:
    """Logp and entropy of the last ``n_completion`` tokens of each row, (B, n_completion), 0 where masked."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-n_completion] = -100
    with fused_head(base, temperature):
        out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return Scores(out.log_probs[:, -n_completion:].float(), out.entropy[:, -n_completion:].float())


class HiddenTap:
    """Keeps the last hidden state of a causal model's backbone while armed: ``with tap: model(...)``, then ``tap.completion(n)``."""

    def __init__(self, model: nn.Module):
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.hidden: Tensor | None = None
        self._armed = False
        self.base.base_model.register_forward_hook(self._keep)

    def __enter__(self) -> Self:
        self._armed = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._armed = False

    def _keep(self, module: nn.Module, args: object, output) -> None:
        if self._armed:
            self.hidden = output.last_hidden_state

    def completion(self, n: int) -> Tensor:
        """(B, n, D) hidden states from which the last ``n`` tokens were predicted; they are let go of."""
        hidden, self.hidden = self.hidden, None
        return hidden[:, -n - 1 : -1]

    @property
    def head(self) -> nn.Module:
        return self.base.get_output_embeddings()


@torch.no_grad()
def ranks(hidden: Tensor, head: nn.Module, ids: Tensor) -> Tensor:
    """Rank of each token under its logits: ``1 + #{v != id : z_v > z_id}``, so ties share the best rank.

    Args:
        hidden: (N, D). head: the LM head. ids: (N,) token ids. Returns (N,) int64. Products are in fp32.
    """
    out = torch.ones_like(ids)
    for rows in torch.arange(len(ids), device=ids.device).split(_TOKENS):
        h, y = hidden[rows].float(), ids[rows]
        target = (h * head.weight[y].float()).sum(-1, keepdim=True)
        if head.bias is not None:
            target = target + head.bias[y, None].float()
        for start in range(0, head.weight.shape[0], _VOCAB):
            logits = _logits(h, head, slice(start, start + _VOCAB))
            above = logits > target
            inside = (y >= start) & (y < start + logits.shape[1])
            above[inside.nonzero()[:, 0], y[inside] - start] = False  # the token itself, whatever the rounding
            out[rows] += above.sum(-1)
    return out


def full_kl(hidden: Tensor, head: nn.Module, ref_hidden: Tensor, ref_head: nn.Module, temperature: float) -> Tensor:
    """``sum_v p_v (ln p_v - ln q_v)`` per token, (N,), with gradient through p; q is the reference.

    Logits are recomputed in the backward, a tile of tokens at a time, so that no (N, vocabulary) tensor is kept.
    """
    if not len(hidden):
        return hidden.sum(-1)
    parts = [
        checkpoint(_kl_tile, h, head, r, ref_head, temperature, use_reentrant=False)
        for h, r in zip(hidden.split(_TOKENS), ref_hidden.split(_TOKENS), strict=True)
    ]
    return torch.cat(parts)


def _kl_tile(h: Tensor, head: nn.Module, ref_h: Tensor, ref_head: nn.Module, temperature: float) -> Tensor:
    logp = (_logits(h.float(), head) / temperature).log_softmax(-1)
    with torch.no_grad():
        ref = (_logits(ref_h.float(), ref_head) / temperature).log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)


def _logits(h: Tensor, head: nn.Module, vocab: slice = slice(None)) -> Tensor:
    bias = None if head.bias is None else head.bias[vocab].float()
    return nn.functional.linear(h, head.weight[vocab].float(), bias)


class Reference:
    """The policy before training: a frozen copy, or the model without its adapters."""

    def __init__(self, policy: nn.Module, device: torch.device):
        self.adapters = policy if hasattr(policy, "peft_config") else None
        self.model = (
            policy if self.adapters is not None else copy.deepcopy(policy).requires_grad_(False).eval().to(device)
        )
        self.tap = HiddenTap(self.model)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, n_completion: int) -> Tensor:
        """(B, n_completion, D) hidden states of the reference policy."""
        without = self.adapters.disable_adapter() if self.adapters is not None else nullcontext()
        with without, self.tap:
            self.tap.base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.tap.completion(n_completion)


def refuse_logit_transforms(config, needed_by: str) -> None:
    """Raise ConfigError for models that scale or cap their logits, which ``full_kl`` does not imitate."""
    for name in _LOGIT_TRANSFORMS:
        value = getattr(config.get_text_config(), name, None)
        if value is not None and not math.isclose(value, 1.0):
            raise ConfigError(
                f"{needed_by} needs the full-vocabulary KL, which is not implemented for models with {name}={value}. "
                "Set its kl_coef=0, or use trainer.beta for TRL's sampled KL."
            )
