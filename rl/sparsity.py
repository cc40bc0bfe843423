"""What of a micro-batch can get gradient, and the smaller micro-batch that is made of it.

Everything here is exact: what is left out has gradient zero, or no influence on what is kept (columns after the last token that
is scored, padding before the first token of every prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl import GRPOConfig

from rl.reduce import world_size
from rl.scoring import Recorded

# Loss types whose gradient at the rollout's own policy is a factor per completion times the effective advantage.
_PER_TOKEN = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
_MEAN_OF_COMPLETION = ("grpo", "sapo")


class Savings(NamedTuple):
    """What loss and plug-ins allow to leave out."""

    rows: bool = False  # a completion of advantage 0 has no gradient
    tokens: bool = (
        False  # a token of effective advantage 0 has none, so with recorded values the plug-ins run beforehand
    )
    stale: bool = False  # the same after the policy has moved on from the rollout
    order: bool = False  # it does not matter in which micro-batch of the optimizer step a completion is
    order_ahead: bool = False  # the same once the plug-ins have run

    @classmethod
    def of(
        cls, args: GRPOConfig, needs: frozenset[str], promises: frozenset[str], *, aux_loss: bool, dropout: bool
    ) -> Savings:
        """From the loss options of TRL and what the plug-ins say of themselves; TRL's entropy bonus needs "entropy.grad"."""
        if aux_loss:  # every token counts in the balance of experts
            return cls()
        # the gradient of scaled logits is not that of logp
        penalty = bool(needs & {"entropy.grad", "logp.grad", "full_kl", "logit_scale"})
        local = args.beta == 0 and not penalty
        tokens = (
            local
            and args.importance_sampling_level == "token"
            and args.off_policy_mask_threshold is None
            and args.top_entropy_quantile == 1.0
        )
        equal = args.loss_type != "bnpo" and not penalty and args.top_entropy_quantile == 1.0
        return cls(
            rows=local and "zero_advantage" not in needs and args.top_entropy_quantile == 1.0,
            tokens=tokens
            and (not dropout or "recorded" in promises),  # with dropout no forward repeats the rollout's values
            stale=tokens and "recorded" in promises and args.loss_type != "vespo",
            order=equal and "alone" in promises,
            order_ahead=equal,
        )


class Cut(NamedTuple):
    """Some rows of a micro-batch, without the columns nobody needs."""

    rows: Tensor  # indices
    ids: Tensor
    attention: Tensor
    labels: Tensor  # -100 where nothing is scored
    completion: slice  # columns of the micro-batch that are still here at the end
    shape: tuple[int, int]  # (B, T)

    @classmethod
    def of(cls, input_ids: Tensor, attention: Tensor, scored: Tensor, rows: Tensor, trim: Trim) -> Cut:
        """The ``rows`` whose tokens in ``scored`` (B, T) shall be scored; T columns at the end are the completion."""
        shape = scored.shape
        prompt, scored = input_ids.shape[1] - shape[1], scored[rows]
        first, end = 0, shape[1]
        if trim.right:
            used = scored.any(0).nonzero()
            end = int(used.max()) + 1 if len(used) else 1
        if trim.left:
            first = int(attention[rows, :prompt].any(0).int().argmax())
        columns = slice(first, prompt + end)
        ids = input_ids[rows, columns]
        labels = torch.full_like(ids, -100)
        labels[:, prompt - first :] = ids[:, prompt - first :].masked_fill(~scored[:, :end], -100)
        return cls(rows, ids, attention[rows, columns], labels, slice(0, end), tuple(shape))

    def score(
        self, model: Callable[..., Any], with_rank: bool = False, hint: Tensor | None = None, with_top: int = 0
    ) -> Recorded:
        """(B, T) logp, entropy, rank and likeliest words from one call of the model, 0 for tokens that are not scored; ``hint`` is
        (B, T)."""
        out = model(
            input_ids=self.ids,
            attention_mask=self.attention,
            labels=self.labels,
            fused_lm_head=True,
            with_rank=with_rank,
            with_top=with_top,
            logp_gradient=None if hint is None else self._beside_labels(hint),
        )
        found = (out.log_probs, out.entropy, out.rank, *(out.top or (None, None)))
        return Recorded(*(None if v is None else self._place(v) for v in found))

    def _place(self, values: Tensor) -> Tensor:
        missing = (0, 0) * (values.dim() - 2) + (0, self.shape[1] - self.completion.stop)
        values = torch.nn.functional.pad(values[:, -self.completion.stop :], missing)
        return values.new_zeros(self.shape + values.shape[2:]).index_copy(0, self.rows, values)

    def _beside_labels(self, values: Tensor) -> Tensor:
        out = values.new_zeros(self.labels.shape)
        out[:, -self.completion.stop :] = values[self.rows, self.completion]
        return out


class Trim(NamedTuple):
    """Which columns a model may go without."""

    left: bool
    right: bool

    @classmethod
    def of(cls, text_config: Any, pad_to_multiple_of: int | None) -> Trim:
        """Right padding has no influence on a causal model; left padding has none where positions are relative (rotary).

        Both have some where the frequencies depend on the width (dynamic, longrope). Queries that are scaled by their absolute
        position (Ministral 3, Llama 4) are not relative.
        """
        ropes = _ropes(getattr(text_config, "rope_parameters", None))
        if pad_to_multiple_of is not None or any(rope["rope_type"] in ("dynamic", "longrope") for rope in ropes):
            return cls(False, False)  # a multiple is asked for by the user, for the shapes
        absolute = any("llama_4_scaling_beta" in rope for rope in ropes) or getattr(
            text_config, "attn_temperature_tuning", 0
        )
        return cls(left=bool(ropes) and not absolute, right=True)


def _ropes(parameters: Any) -> list[Mapping[str, Any]]:
    """The parameters of each kind of layer that turns by position, none if one does not."""
    if not isinstance(parameters, Mapping) or not parameters:
        return []
    if "rope_type" in parameters:
        return [parameters]
    kinds = [_ropes(kind) for kind in parameters.values()]
    return [rope for kind in kinds for rope in kind] if all(kinds) else []


def score_all(
    model: Callable[..., Any],
    input_ids: Tensor,
    attention: Tensor,
    scored: Tensor,
    size: int,
    trim: Trim,
    with_rank: bool = False,
    with_top: int = 0,
) -> Recorded:
    """Scores every token in ``scored``, ``size`` rows of similar length at a time."""
    found = None
    for rows in attention.sum(-1).argsort(stable=True).split(size):
        part = Cut.of(input_ids, attention, scored, rows, trim).score(model, with_rank, with_top=with_top)
        found = part if found is None else _sum(found, part)
    return found


def _sum(a: Recorded, b: Recorded) -> Recorded:
    """Of different rows, each 0 in the other's."""
    return Recorded(*(None if x is None else x + y for x, y in zip(a, b, strict=True)))


def score_live(
    model: nn.Module,
    input_ids: Tensor,
    attention: Tensor,
    scored: Tensor,
    live: Tensor | None,
    trim: Trim,
    with_rank: bool = False,
) -> Recorded:
    """Scores every token in ``scored``, with gradient in the rows ``live`` only. Every rank calls the model equally often.

    ``live=None``: nothing gets gradient, and no parameter but one is told so.
    """
    if live is None:
        with torch.no_grad():
            found = score_all(model, input_ids, attention, scored, len(input_ids), trim, with_rank)
        return found._replace(logp=found.logp + no_gradient(model))
    found = Cut.of(input_ids, attention, scored, live, trim).score(model, with_rank)
    dead = torch.ones_like(scored[:, :1]).index_fill_(0, live, False)
    if bool(dead.any()) or world_size() > 1:
        with torch.no_grad():
            rest = Cut.of(input_ids, attention, scored & dead, rows_in(dead), trim).score(model, with_rank)
        found = _sum(found, rest)
    return found


def rows_in(where: Tensor) -> Tensor:
    """Indices of the rows with a token in ``where``; row 0 where there is none, so that every parameter gets its zero."""
    rows = where.any(-1).nonzero().squeeze(1)
    return rows if len(rows) else torch.zeros(1, dtype=torch.long, device=where.device)


def has_dropout(model: nn.Module) -> bool:
    """Whether two forwards in training may differ."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config()
    return modules or any(getattr(config, f"{kind}_dropout", None) for kind in ("attention", "hidden"))


def no_gradient(model: nn.Module) -> Tensor:
    """A zero with a graph, whose backward reaches one small parameter and computes nothing."""
    smallest = min((p for p in model.parameters() if p.requires_grad), key=Tensor.numel)
    return smallest.flatten()[:0].sum()


def per_token(advantages: Tensor) -> Tensor:
    """TRL's advantages are (B,), those of plug-ins (B, T)."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def expected_gradient(args: GRPOConfig, inputs: Mapping[str, Any], mask: Tensor, effective: Tensor) -> Tensor | None:
    """(B, T) what the gradient of each logp is going to be up to one common factor; None where that is not known."""
    own_policy = "old_per_token_logps" not in inputs and "importance_sampling_ratio" not in inputs
    if not own_policy or args.loss_type not in _PER_TOKEN or args.importance_sampling_level != "token":
        return None
    if args.loss_type in _MEAN_OF_COMPLETION:
        return -effective / mask.sum(-1, keepdim=True).clamp(min=1)
    return -effective


def by_length(batches: Sequence[Mapping[str, Any]], lengths: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The same completions in as many micro-batches of the same sizes, short ones first.

    Args:
        batches: tensors and lists by name, rows are completions; what has no rows is taken from the micro-batch in its place.
        lengths: (B,) for each.
    """
    sizes = [len(length) for length in lengths]
    order = torch.cat(list(lengths)).argsort(stable=True)
    out: list[dict[str, Any]] = [dict(batch) for batch in batches]
    for name, value in batches[0].items():
        if isinstance(value, list) and len(value) == sizes[0]:
            whole = [item for batch in batches for item in batch[name]]
            whole = [whole[i] for i in order.tolist()]
            for batch, end, size in zip(out, accumulate(sizes), sizes, strict=True):
                batch[name] = whole[end - size : end]
        elif isinstance(value, Tensor) and value.dim() and len(value) == sizes[0]:
            whole = torch.cat([batch[name] for batch in batches])[order]
            for batch, part in zip(out, whole.split(sizes), strict=True):
                batch[name] = part
    return out


def lengths_of(inputs: Mapping[str, Any], scored: Tensor, live: Tensor) -> Tensor:
    """(B,) tokens that a forward has to look at to score those in ``scored``; 0 for a completion without any.

    Completions with a ``live`` token come after all others: their length is counted from a full row on.
    """
    place = torch.arange(1, scored.shape[1] + 1, device=scored.device)
    last = (scored * place).amax(-1) if scored.shape[1] else scored.sum(-1)
    length = torch.where(last > 0, last + inputs["prompt_mask"].sum(-1), 0)
    return length + live.any(-1) * (inputs["prompt_mask"].shape[1] + scored.shape[1])
