"""A causal model that scores tokens instead of giving logits, the reference policy, and the divergence between the two."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl import GRPOConfig
from trl.trainer.utils import maybe_gather_lm_head_ctx

from rl.alternatives import Alternatives, alternatives
from rl.contract import TokenBatch
from rl.errors import ConfigError
from rl.groups import on_policy
from rl.head import head_stats
from rl.pipeline import Pipeline
from rl.tiles import LogitRule

_LOGITS = 1 << 24  # logits of one tile of the full-vocabulary KL: 64 MiB in fp32


class Scores(NamedTuple):
    """Per completion token: logp of the sampled token and entropy of its distribution, in nats, at the temperature."""

    logp: Tensor
    entropy: Tensor


class Recorded(NamedTuple):
    """What is known of each completion token under one policy, (B, T)."""

    logp: Tensor
    entropy: Tensor
    rank: Tensor | None
    top_ids: Tensor | None = None  # (B, T, k), most likely first
    top_logp: Tensor | None = None

    def named(self, prefix: str, mask: Tensor) -> dict[str, Tensor]:
        """``<prefix>_logp``, ``_entropy`` and ``_rank``, what there is, as wide as ``mask`` and 0 outside it."""
        known = {"logp": self.logp, "entropy": self.entropy, "rank": self.rank}
        padded = {n: functional.pad(v, (0, mask.shape[1] - v.shape[1])) for n, v in known.items() if v is not None}
        return {f"{prefix}_{name}": values.masked_fill(mask == 0, 0) for name, values in padded.items()}


@dataclass
class ScoredOutput(ModelOutput):
    """(B, L - 1) each, 0 where the next token's label is -100; log_probs and entropy carry gradient."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    rank: Tensor | None = None
    top: Alternatives | None = None  # (B, L - 1, k)
    aux_loss: Tensor | None = None  # a mixture of experts' load-balancing loss, where its config asks for router logits


def add_scoring(model: nn.Module, temperature: float, fp32_head: bool = False) -> None:
    """``model(..., labels=labels, fused_lm_head=True)`` then returns a ScoredOutput; without it, what it did before.

    The call is the one of TRL's ``add_fused_lm_head``, and takes its place. Only tokens with a label are projected. Further
    arguments of the call: ``with_rank``; ``with_top``, how many of the most likely words; ``logp_gradient``, (B, L) as the
    labels, see ``head_stats``.

    Args:
        fp32_head: project in fp32, outside autocast (``cast_lm_head_to_fp32``).
    """
    before = model.forward
    text = model.config.get_text_config()
    rule = logit_rule(text, temperature)

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self, *args, fused_lm_head=False, labels=None, with_rank=False, with_top=0, logp_gradient=None, **kwargs
    ):
        if not fused_lm_head:
            return before(*args, **kwargs) if labels is None else before(*args, labels=labels, **kwargs)
        router = bool(getattr(text, "output_router_logits", False))
        if router:
            kwargs.setdefault("output_router_logits", True)
        backbone = self.base_model(*args, use_cache=False, **kwargs)
        hidden = backbone.last_hidden_state
        scores = _score_labels(self, hidden, labels, rule, fp32_head, with_rank, with_top, logp_gradient)
        if kwargs.get("output_router_logits"):
            scores.aux_loss = load_balancing_loss_func(
                backbone.router_logits, text.num_experts, text.num_experts_per_tok, kwargs.get("attention_mask")
            )
        return scores

    model.forward = types.MethodType(forward, model)


def _score_labels(
    model, hidden: Tensor, labels: Tensor, rule: LogitRule, fp32_head: bool, with_rank: bool, with_top: int, gradient
) -> ScoredOutput:
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if hasattr(weight, "full_tensor"):  # sharded by FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    hidden, labels = hidden[:, :-1].to(weight.device), labels[:, 1:].to(weight.device)
    mask = labels != -100
    rows = hidden[mask]
    rows, top = rows.float() if fp32_head else rows, None
    with torch.autocast(rows.device.type, enabled=False) if fp32_head else nullcontext():
        stats = head_stats(
            rows,
            weight,
            labels[mask],
            bias=bias,
            rule=rule,
            extras=("rank",) if with_rank else (),
            gradient=None if gradient is None else gradient[:, 1:][mask],
            gathered=maybe_gather_lm_head_ctx,
        )
        if with_top:
            with maybe_gather_lm_head_ctx(weight, bias):
                top = alternatives(rows, weight, bias, rule, with_top)

    def placed(values: Tensor | None) -> Tensor | None:  # differentiable also where no label is left
        if values is None:
            return None
        where = mask.view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:])
        return values.new_zeros(where.shape).masked_scatter(where, values)

    top = None if top is None else Alternatives(*map(placed, top))
    return ScoredOutput(placed(stats.logp), placed(stats.entropy), placed(stats.rank), top)


def logit_rule(text_config: Any, temperature: float) -> LogitRule:
    """How this model family scales and caps its logits, as transformers' own forward does."""

    def value(name: str) -> float | None:
        return getattr(text_config, name, None)

    scale = next(
        (s for s in map(value, ("logit_scale", "output_multiplier", "lm_head_multiplier")) if s is not None), None
    )
    if scale is None and (scaling := value("logits_scaling")) is not None:  # Granite divides, HyperCLOVA X multiplies
        scale = scaling if text_config.model_type == "hyperclovax" else 1 / scaling
    return LogitRule(temperature, 1.0 if scale is None else scale, value("final_logit_softcapping"))


@contextmanager
def scoring(model: nn.Module, temperature: float) -> Iterator[None]:
    """Within the context the model scores labels at ``temperature``."""
    patched = model.__dict__.get("forward")
    add_scoring(model, temperature)
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
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-n_completion] = -100
    with scoring(base_of(model), temperature):
        out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return Scores(out.log_probs[:, -n_completion:].float(), out.entropy[:, -n_completion:].float())


class Looked(NamedTuple):
    """Everything there is to see of each completion token, (B, T), at the temperature; ``top`` has (B, T, k)."""

    logp: Tensor
    entropy: Tensor
    rank: Tensor
    top: Alternatives


@torch.no_grad()
def look(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, n_completion: int, temperature: float, k: int = 5
) -> Looked:
    """:func:`score`, and the rank of each token and the ``k`` most likely words in its place. With sharded weights every rank
    must call it equally often."""
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-n_completion] = -100
    options = {"with_rank": True, "with_top": k, "fused_lm_head": True}
    with scoring(base_of(model), temperature):
        out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
    last = slice(-n_completion, None)
    top = Alternatives(out.top.ids[:, last], out.top.logp[:, last].float())
    return Looked(out.log_probs[:, last].float(), out.entropy[:, last].float(), out.rank[:, last], top)


def base_of(model: nn.Module) -> nn.Module:
    """The causal model itself, under its adapters if it has any.

    Raises:
        ConfigError: prompt tuning, which lives outside of it.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ConfigError(
            "peft: prompt tuning puts tokens before the prompt, which entrl does not score. Use peft=lora."
        )
    # a folder of adapters loads as the model itself, with a peft_config but nothing around it
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class HiddenTap:
    """Keeps the last hidden state of a causal model's backbone while armed: ``with tap: model(...)``, then ``tap.completion(n)``."""

    def __init__(self, model: nn.Module):
        self.base = base_of(model)
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
        """(B, n, D) hidden states from which the last ``n`` tokens were predicted; they are let go of at ``free``."""
        return self.hidden[:, -n - 1 : -1]

    def free(self) -> None:
        """Keep them no longer."""
        self.hidden = None

    def scaled(self, found: Recorded, tokens: TokenBatch, scale: Tensor, fp32_head: bool = False) -> Recorded:
        """``found`` with the (B, T) logp, with gradient, of logits times ``scale`` > 0; as it was where that is 1."""
        logp, ids = found.logp, tokens.ids
        rule = logit_rule(self.base.config.get_text_config(), tokens.temperature)
        hidden = self.hidden[:, -ids.shape[1] - 1 :]
        for factor in scale.unique().tolist():
            if factor != 1:
                labels = nn.functional.pad(ids.masked_fill(scale != factor, -100), (1, 0), value=-100)
                # as a temperature, so that caps and biases are in the logits too
                cooler = rule._replace(temperature=rule.temperature / factor)
                scaled = _score_labels(self.base, hidden, labels, cooler, fp32_head, False, 0, None).log_probs
                logp = torch.where(scale == factor, scaled, logp)
        return found._replace(logp=logp)

    @property
    def head(self) -> nn.Module:
        return self.base.get_output_embeddings()


def full_kl(hidden: Tensor, head: nn.Module, ref_hidden: Tensor, ref_head: nn.Module, temperature: float) -> Tensor:
    """``sum_v p_v (ln p_v - ln q_v)`` per token, (N,), with gradient through p; q is the reference.

    Logits are recomputed in the backward, a tile of tokens at a time, so that no (N, vocabulary) tensor is kept.
    """
    if not len(hidden):
        return hidden.sum(-1)
    size = max(1, _LOGITS // head.weight.shape[0])
    parts = [
        checkpoint(_kl_tile, h, head, r, ref_head, temperature, use_reentrant=False)
        for h, r in zip(hidden.split(size), ref_hidden.split(size), strict=True)
    ]
    return torch.cat(parts)


def _kl_tile(h: Tensor, head: nn.Module, ref_h: Tensor, ref_head: nn.Module, temperature: float) -> Tensor:
    logp = (_logits(h.float(), head) / temperature).log_softmax(-1)
    with torch.no_grad():
        ref = (_logits(ref_h.float(), ref_head) / temperature).log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)


def _logits(h: Tensor, head: nn.Module) -> Tensor:
    return nn.functional.linear(h, head.weight.float(), None if head.bias is None else head.bias.float())


class WithRank:
    """A model for TRL's own forward, which drops the ranks: they are kept here."""

    def __init__(self, model: nn.Module, with_rank: bool):
        self.model, self.with_rank, self._ranks = model, with_rank, []

    def __call__(self, **inputs) -> ScoredOutput:
        out = self.model(**inputs, with_rank=self.with_rank)
        self._ranks.append(out.rank)
        return out

    def rank(self, n_completion: int) -> Tensor | None:
        """(B, n_completion), None unless asked for."""
        return torch.cat(self._ranks)[:, -n_completion:] if self.with_rank else None


class Reference:
    """The policy before training: a frozen copy, or the model without its adapters."""

    def __init__(self, policy: nn.Module, device: torch.device, temperature: float):
        self.temperature = temperature
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
        hidden = self.tap.completion(n_completion)
        self.tap.free()
        return hidden

    def full_kl(self, policy: HiddenTap, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """(B, T) divergence of the policy, whose hidden states ``policy`` has kept, from this one; 0 outside ``mask``."""
        n = mask.shape[1]
        hidden, reference = policy.completion(n)[mask], self.hidden(input_ids, attention_mask, n)[mask]
        kl = full_kl(hidden, policy.head, reference, self.tap.head, self.temperature)
        return torch.zeros_like(mask, dtype=kl.dtype).masked_scatter(mask, kl)


def check_needs(pipeline: Pipeline, config, accelerator: Accelerator, args: GRPOConfig) -> None:
    """Raise ConfigError where ``full_kl`` or ``logit_scale`` would be wrong or impossible: transformed logits, sharded weights, and
    an old policy whose scaled logits nobody recorded."""
    if "full_kl" in pipeline.needs:
        asking = pipeline.asking("full_kl")
        refuse_logit_transforms(config, asking)
        refuse_sharded(accelerator, asking)
    if "logit_scale" in pipeline.needs:
        asking = pipeline.asking("logit_scale")
        refuse_sharded(accelerator, asking, "logit_scale")
        if not on_policy(args):
            raise ConfigError(
                f"{asking} scales logits, of the old policy too, which are known on-policy only. Here there is more than one update from "
                f"a rollout. Set trainer.steps_per_generation={args.gradient_accumulation_steps} trainer.num_iterations=1."
            )


def refuse_logit_transforms(config, needed_by: str) -> None:
    """Raise ConfigError for models that scale or cap their logits, which ``full_kl`` does not imitate."""
    _, scale, softcap = logit_rule(config.get_text_config(), 1.0)
    if softcap is not None or not math.isclose(scale, 1.0):
        raise ConfigError(
            f"{needed_by} needs the full-vocabulary KL, which is not implemented for models that scale their logits (here "
            f"by {scale:g}) or cap them (here at {softcap}). Set its kl_coef=0, or use trainer.beta for TRL's sampled KL."
        )


def refuse_sharded(accelerator: Accelerator, needed_by: str, need: str = "full_kl") -> None:
    """Raise ConfigError where no rank has the whole head, which ``full_kl`` and ``logit_scale`` read."""
    zero = getattr(accelerator.state, "deepspeed_plugin", None)
    if zero is not None and zero.zero_stage == 3:
        raise sharded("ZeRO-3", needed_by, need)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise sharded("FSDP", needed_by, need)


def sharded(by: str, needed_by: str, need: str = "full_kl") -> ConfigError:
    """The error for that."""
    if need == "logit_scale":
        return ConfigError(
            f"{needed_by} scales logits, which is not implemented for weights that are sharded (here by {by}). Use ZeRO-2 or plain "
            "data parallelism."
        )
    return ConfigError(
        f"{needed_by} needs the full-vocabulary KL, which is not implemented for weights that are sharded (here by {by}). Use ZeRO-2 or "
        "plain data parallelism, or set its kl_coef=0 and use trainer.beta for TRL's sampled KL."
    )
