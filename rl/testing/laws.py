"""The laws every plug-in obeys, each a function of what makes the plug-in: its class, or ``partial(MyIdea, power=2.0)``.

A law raises AssertionError with a sentence. One about something that a plug-in does not have, a promise say, holds of itself. Every
law makes plug-ins of its own, so that the state of one never reaches another.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from rl.contract import NEEDS, PROMISES, Explanation, Rollout, Signal, TokenBatch
from rl.pipeline import Pipeline
from rl.plugins.rank_shaping import RankShaping
from rl.reduce import Reduce
from rl.testing.batch import batch_from_logits, loss_from_signal
from rl.testing.samples import (
    GROUP,
    Make,
    batch_for,
    noted,
    of_tokens,
    random_logits,
    rows_of,
    scale_of,
    tensors_of,
    through,
)

_STATISTICS = ("sum", "max", "quantile", "topk")  # mean, count and min are made of these
_READABLE = (
    "advantages",
    "logp",
    "old_logp",
    "entropy",
    "old_entropy",
    "rank",
    "ref_logp",
    "full_kl",
    "rollout_entropy",
    "reward",
    "group",
    "ids",
)


def applied(make: Make, tokens: TokenBatch) -> Signal:
    """What a fresh plug-in makes of plain GRPO."""
    return make()(tokens, Signal.start(tokens))


def must(holds: bool | Tensor, sentence: str) -> None:
    if not bool(holds):  # not assert: python -O would leave it out
        raise AssertionError(sentence)


def close(a: Tensor, b: Tensor, sentence: str, rtol: float = 0, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda found: f"{sentence}\n{found}")


# ---- what it does --------------------------------------------------------------------------------------------------------


def needs_and_promises_are_known(make: Make) -> None:
    """``needs`` and ``promises`` are words of the contract."""
    plugin = make()
    must(plugin.needs <= NEEDS, f"needs {sorted(plugin.needs - NEEDS)}: known are {sorted(NEEDS)}.")
    unknown = _promises(make) - PROMISES
    must(not unknown, f"promises {sorted(unknown)}: known are {sorted(PROMISES)}.")


def is_the_identity_at_neutral(make: Make) -> None:
    """With the arguments in ``neutral``, unless that is None, the policy loss is that of plain GRPO and every penalty is 0."""
    neutral = make().neutral
    if neutral is None:
        return
    still = partial(make, **neutral)
    tokens = batch_for(still, requires_grad=True)
    plain, signal = Signal.start(tokens), applied(still, tokens)
    same = torch.equal(signal.effective[tokens.mask], plain.effective[tokens.mask])
    must(same, f"at neutral={neutral} it still changes advantages, weights or the mask.")
    must((scale_of(signal) == 1).all(), f"at neutral={neutral} it still scales logits.")
    zero = all(p.coef == 0 or p.mean(tokens.mask).item() == 0 for p in signal.penalties)
    must(zero, f"at neutral={neutral} a penalty is still not 0.")


def leaves_padding_alone(make: Make) -> None:
    """Outside ``mask`` the weight is 1, the advantage is as it was, and no penalty counts."""
    tokens = batch_for(make)
    signal, outside = applied(make, tokens), ~tokens.mask
    must(not signal.keep[outside].any(), "a token outside the mask is kept. Use signal.drop, which can only take away.")
    same = torch.equal(signal.advantages[outside], tokens.advantages[outside])
    must(same, "the advantage of a token outside the mask is changed. End with advantages.where(tokens.mask, old).")
    must(
        (signal.weight[outside] == 1).all(),
        "a weight outside the mask is not 1. End with weight.where(tokens.mask, 1.0).",
    )
    unscaled = (scale_of(signal)[outside] == 1).all()
    must(unscaled, "logits outside the mask are scaled. End with scale.where(tokens.mask, 1.0).")
    inside = all(not (p.where & outside).any() for p in signal.penalties)
    must(inside, "a penalty counts tokens outside the mask. Hand in where & tokens.mask.")


def does_not_read_padding(make: Make) -> None:
    """Other numbers outside ``mask`` change nothing inside."""
    tokens = batch_for(make)
    noise = {"entropy": 7.0, "logp": -3.0, "old_logp": -0.1, "old_entropy": 9.0, "full_kl": 5.0}
    changed = replace(tokens, **{f: getattr(tokens, f).masked_fill(~tokens.mask, v) for f, v in noise.items()})
    a, b = applied(make, tokens), applied(make, changed)
    sentence = "what stands in the padding matters. Take statistics by tokens.reduce, which looks at the mask."
    must(torch.equal(of_tokens(a)[tokens.mask], of_tokens(b)[tokens.mask]), sentence)
    same = all(torch.equal(p.mean(tokens.mask), q.mean(tokens.mask)) for p, q in _pairs(a, b))
    must(same, sentence)


def gives_finite_weights_of_at_least_0(make: Make) -> None:
    """Weights are finite and >= 0, the rescaling and the scale of logits > 0, advantages finite."""
    signal = applied(make, batch_for(make))
    must(signal.weight.isfinite().all() and (signal.weight >= 0).all(), "a weight is below 0 or not finite.")
    must(signal.rescale.isfinite().all() and (signal.rescale > 0).all(), "the rescaling is not above 0 or not finite.")
    must(signal.advantages.isfinite().all(), "an advantage is not finite.")
    scale = scale_of(signal)
    must(scale.isfinite().all() and (scale > 0).all(), "a scale of logits is not above 0 or not finite.")


def lets_no_gradient_through(make: Make) -> None:
    """Weights, masks, advantages and scales of logits carry no gradient."""
    signal = applied(make, batch_for(make, requires_grad=True))
    sentence = "a gradient flows through it. Make signals by their helpers, which detach."
    must(not of_tokens(signal).requires_grad and not any(p.where.requires_grad for p in signal.penalties), sentence)


def does_not_care_for_the_order_of_completions(make: Make) -> None:
    """Permuted completions give the permuted result."""
    tokens, order = batch_for(make), torch.tensor([3, 0, 5, 2, 1, 4])
    a, b = applied(make, tokens), applied(make, rows_of(tokens, order))
    close(of_tokens(a)[order], of_tokens(b), "the order of completions matters.")
    for p, q in _pairs(a, b):
        close(p.mean(tokens.mask), q.mean(tokens.mask[order]), f"the order of completions matters to {p.name}.")


def does_not_change_the_batch(make: Make) -> None:
    """The tensors it is given are as they were."""
    tokens = batch_for(make)
    before = {f: v.clone() for f, v in tensors_of(tokens).items()}
    applied(make, tokens)
    changed = [f for f, v in before.items() if not torch.equal(v, getattr(tokens, f))]
    must(not changed, f"it changes tokens.{', tokens.'.join(changed)} in place. Work on a copy.")


def in_bf16_is_close_to_fp32(make: Make) -> None:
    """The loss of a bf16 batch is close to that of the same numbers in fp32; a few tokens may change sides."""
    losses, tokens = [], batch_for(make, dtype=torch.bfloat16, rows=200)
    logits = random_logits(torch.bfloat16, rows=200)
    for dtype in (torch.bfloat16, torch.float32):
        cast = {f: v.to(dtype) for f, v in tensors_of(tokens).items() if v.is_floating_point()}
        notes = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tokens.noted.items()}
        typed = replace(tokens, **cast, noted=notes)
        losses.append(loss_from_signal(typed, applied(make, typed), logits=logits.to(dtype)).item())
    close = math.isclose(*losses, rel_tol=0.1, abs_tol=0.1)
    must(close, f"in bf16 the loss is {losses[0]:.4g}, in fp32 {losses[1]:.4g}.")


def works_without_tokens(make: Make) -> None:
    """Empty batches, single tokens and batches that are all padding give a finite loss."""
    for shape in ((2, 3), (1, 1), (2, 0), (0, 3)):
        pair = (GROUP, shape[1])  # a rollout has whole groups, whatever of it is in a micro-batch
        logits = torch.zeros(*pair, 5, dtype=torch.float64)
        for mask in (torch.zeros(pair), torch.ones(pair)):
            advantages = torch.ones(GROUP, dtype=torch.float64)
            tokens = noted(make, batch_from_logits(logits, torch.zeros(pair), mask, advantages, ref_logits=logits))
            tokens = rows_of(tokens, slice(0, shape[0]))
            what = f"of {shape[0]} x {shape[1]} tokens, {int(tokens.mask.sum())} of them trainable,"
            loss = loss_from_signal(tokens, applied(make, tokens), logits=logits[: shape[0]])
            must(loss.isfinite(), f"the loss {what} is {loss.item()}.")


def touches_something(make: Make) -> None:
    """As it is set it changes a token, and the audit counts it."""
    tokens = batch_for(make)
    metrics = through(Pipeline({"it": make()}), tokens).metrics
    touched, mass = metrics["plugin/it/touched"], metrics["plugin/it/adv_mass"]
    must(touched.count == tokens.mask.sum() and touched.total > 0, "as it is set it changes no token.")
    must(mass.count > 0 and mass.total.isfinite(), "|advantage| after it is not finite.")


def as_a_shadow_changes_nothing(make: Make) -> None:
    """Beside another method, as a shadow, it leaves signal, series and random numbers alone."""
    tokens = batch_for(make, requires_grad=True)
    alone, random = through(Pipeline({"acts": RankShaping()}), tokens), torch.get_rng_state()
    beside = through(Pipeline({"acts": RankShaping()}, {"it": make()}), tokens)
    same = torch.equal(of_tokens(alone), of_tokens(beside)) and not beside.penalties
    must(same, "as a shadow it changes the loss.")
    pairs = [p for name in alone.metrics for p in zip(alone.metrics[name], beside.metrics[name], strict=True)]
    must(all(torch.equal(*pair) for pair in pairs), "as a shadow it changes another method's series.")
    known = {"plugin/it/touched", "shadow/it/cosine", "shadow/it/jaccard"} <= beside.metrics.keys()
    must(known, "as a shadow it is not measured.")
    must(torch.equal(torch.get_rng_state(), random), "as a shadow it draws random numbers of the run.")


# ---- what it promises ----------------------------------------------------------------------------------------------------


def reads_only_the_record_if_it_promises(make: Make) -> None:
    """With "recorded" in ``promises``, the current policy's logp, entropy and rank change nothing."""
    if "recorded" not in _promises(make):
        return
    tokens = batch_for(make)
    moved = replace(tokens, logp=tokens.logp - 0.5, entropy=tokens.entropy + 1.0, rank=tokens.rank + 1)
    same = torch.equal(of_tokens(applied(make, tokens)), of_tokens(applied(make, moved)))
    must(same, 'it promises "recorded", and reads logp, entropy or rank of the current policy.')


def treats_completions_alone_if_it_promises(make: Make) -> None:
    """With "alone" in ``promises``, a completion by itself gets what it gets among others."""
    if "alone" not in _promises(make):
        return
    tokens = batch_for(make)
    together = of_tokens(applied(make, tokens))
    for i in range(len(tokens.mask)):
        own = rows_of(tokens, slice(i, i + 1))
        sentence = f'it promises "alone", and completion {i} gets something else by itself.'
        close(of_tokens(applied(make, own)), together[i : i + 1], sentence)


def gives_nothing_to_advantage_0_unless_it_says_so(make: Make) -> None:
    """Without "zero_advantage" in ``needs``, completions of advantage 0 get no gradient."""
    if "zero_advantage" in make().needs:
        return
    tokens = batch_for(make)
    still = replace(tokens, advantages=tokens.advantages * torch.tensor([0, 1, 1, 0, 1, 0])[:, None])
    none = not applied(make, still).effective[[0, 3, 5]].any()
    must(none, 'a completion of advantage 0 gets gradient. Add "zero_advantage" to needs.')


def penalises_what_carries_gradient(make: Make) -> None:
    """A penalty carries gradient, and ``needs`` says of what."""
    for penalty in applied(make, batch_for(make, requires_grad=True)).penalties:
        said = bool(make().needs & {"logp.grad", "entropy.grad", "full_kl"})
        sentence = 'carries no gradient, or needs does not say of what: "logp.grad", "entropy.grad" or "full_kl".'
        must(said and penalty.per_token.requires_grad, f"the penalty {penalty.name} {sentence}")


# ---- what it says of itself ----------------------------------------------------------------------------------------------


def names_the_scopes_it_uses(make: Make) -> None:
    """``explain().statistics`` has the scopes it asks ``tokens.reduce`` for, "group" for ``rollout.groups``, and no other."""
    if (said := _explained(make)) is None:
        return
    used: set[str] = set()

    def recorded(original: Callable) -> Callable:
        def call(*args, **kwargs):
            used.add(inspect.signature(original).bind(*args, **kwargs).arguments["scope"])
            return original(*args, **kwargs)

        return call

    groups = Rollout.groups

    def recorded_groups(rollout: Rollout, values: Tensor) -> Tensor:
        used.add("group")
        return groups(rollout, values)

    statistics = {name: recorded(getattr(Reduce, name)) for name in _STATISTICS}
    with mock.patch.multiple(Reduce, **statistics), mock.patch.object(Rollout, "groups", recorded_groups):
        applied(make, batch_for(make))
    scopes = set(said.statistics.values())
    if "group" in used:  # who sees all prompts may also say what is one number of the whole rollout
        scopes -= {"rollout"}
    must(used == scopes, f"explain().statistics names the scopes {sorted(scopes)}, and it uses {sorted(used)}.")


def has_the_denominator_and_penalties_it_says(make: Make) -> None:
    """``explain()`` has its denominator, its penalties and their coefficients."""
    if (said := _explained(make)) is None:
        return
    tokens = batch_for(make, requires_grad=True)
    signal = applied(make, tokens)
    kept = (signal.keep & tokens.mask).sum()
    factor = tokens.mask.sum() / kept if said.denominator == "kept" else torch.tensor(1.0)
    sentence = f'explain().denominator is "{said.denominator}", and the policy loss is rescaled otherwise.'
    close(signal.rescale.double(), factor.double(), sentence, rtol=1e-6, atol=0)
    found = {p.name: (p.coef, p.denominator) for p in signal.penalties}
    must(found == dict(said.penalties), f"explain().penalties is {dict(said.penalties)}, and it has {found}.")


def changes_what_it_says(make: Make) -> None:
    """``explain().changes`` has the fields of the signal that it changes, and no other."""
    if (said := _explained(make)) is None:
        return
    tokens = batch_for(make)
    start, after = Signal.start(tokens), applied(make, tokens)
    fields = ("keep", "weight", "advantages")
    found = {f for f in fields if not torch.equal(getattr(start, f), getattr(after, f))}
    found |= {"logit_scale"} if (scale_of(after) != 1).any() else set()
    must(found == set(said.changes), f"explain().changes is {list(said.changes)}, and it changes {sorted(found)}.")


def reads_what_it_says(make: Make) -> None:
    """``explain().reads`` has the fields of the batch that decide what it does, and no other."""
    if (said := _explained(make)) is None:
        return
    tokens = batch_for(make)
    for field in _READABLE:
        changed = noted(make, replace(tokens, **{field: _other(field, getattr(tokens, field))}))
        # advantages that are handed on are no reading of them
        passes = field == "advantages" and "advantages" not in said.changes
        same = all(map(torch.equal, _doing(make, tokens, passes), _doing(make, changed, passes)))
        wrong = f"does not list {field}, which decides" if not same else f"lists {field}, which does not decide"
        must(same == (field not in said.reads), f"explain().reads {wrong} what it does.")


def _other(field: str, value: Tensor) -> Tensor:
    """Other values that the field might have."""
    other = torch.rand(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = {"logp": -3 * other, "old_logp": -3 * other, "advantages": 6 * (other - 0.5)}.get(field, 3 * other)
    return (other if value.is_floating_point() else (11 * other).long()).to(value.dtype)


def _doing(make: Make, tokens: TokenBatch, passes: bool) -> list[Tensor]:
    signal = applied(make, tokens)
    penalties = [p.mean(tokens.mask) for p in signal.penalties]
    advantages = [] if passes else [signal.advantages[tokens.mask]]
    return [signal.keep, signal.weight, signal.rescale, scale_of(signal), *advantages, *penalties]


def _explained(make: Make) -> Explanation | None:
    plugin = make()
    return plugin.explain() if hasattr(plugin, "explain") else None


def _promises(make: Make) -> frozenset[str]:
    return frozenset(getattr(make(), "promises", ()))


def _pairs(a: Signal, b: Signal) -> list[tuple]:
    must(len(a.penalties) == len(b.penalties), "the number of penalties depends on the batch.")
    return list(zip(a.penalties, b.penalties, strict=True))


OF_ONE_PROCESS: tuple[Callable[[Make], None], ...] = (
    needs_and_promises_are_known,
    is_the_identity_at_neutral,
    leaves_padding_alone,
    does_not_read_padding,
    gives_finite_weights_of_at_least_0,
    lets_no_gradient_through,
    does_not_care_for_the_order_of_completions,
    does_not_change_the_batch,
    in_bf16_is_close_to_fp32,
    works_without_tokens,
    touches_something,
    as_a_shadow_changes_nothing,
    reads_only_the_record_if_it_promises,
    treats_completions_alone_if_it_promises,
    gives_nothing_to_advantage_0_unless_it_says_so,
    penalises_what_carries_gradient,
    names_the_scopes_it_uses,
    has_the_denominator_and_penalties_it_says,
    changes_what_it_says,
    reads_what_it_says,
)
