"""The laws of two plug-ins that run one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rl.contract import PROMISES, Rollout, Signal, TokenBatch
from rl.pipeline import Pipeline
from rl.testing import laws
from rl.testing.batch import loss_from_signal
from rl.testing.laws import applied, close, must
from rl.testing.samples import Make, batch_for, of_tokens, random_batch, random_logits, scale_of, through

# Those that can fail of two plug-ins each of which keeps them; the others are about one plug-in's own arithmetic or words.
_ALSO_OF_TWO = (
    laws.leaves_padding_alone,
    laws.does_not_read_padding,
    laws.gives_finite_weights_of_at_least_0,
    laws.lets_no_gradient_through,
    laws.does_not_care_for_the_order_of_completions,
    laws.does_not_change_the_batch,
    laws.works_without_tokens,
    laws.reads_only_the_record_if_it_promises,
    laws.treats_completions_alone_if_it_promises,
    laws.gives_nothing_to_advantage_0_unless_it_says_so,
    laws.penalises_what_carries_gradient,
)


class _InTurn:
    """Two plug-ins as one, run and audited by a pipeline."""

    neutral: None = None  # a partner at neutral has a law of its own

    def __init__(self, first: Make, second: Make):
        self.pipeline = Pipeline({"first": first(), "second": second()})
        self.needs = self.pipeline.needs
        plugins = self.pipeline.plugins.values()
        self.promises = PROMISES.intersection(*(getattr(plugin, "promises", ()) for plugin in plugins))

    def at_rollout(self, rollout: Rollout) -> Mapping[str, Tensor]:
        return self.pipeline.at_rollout(rollout)

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        return self.pipeline(tokens)  # a pipeline starts from plain GRPO, and so do the laws


def check_pair(first: Make, second: Make) -> None:
    """Compare two plug-ins in this order with each alone, and try the laws that can fail of two only.

    Raises:
        AssertionError: with a sentence.
    """
    for law in _ALSO_OF_TWO:
        law(partial(_InTurn, first, second))
    composes_as_the_contract_says(first, second)
    has_a_finite_loss_and_both_audits(first, second)
    takes_no_notice_of_a_neutral_partner(first, second)


def composes_as_the_contract_says(first: Make, second: Make) -> None:
    """Masks are and-ed, weights, rescalings and scales of logits multiplied, penalties listed, and of the first one's work the
    second sees the advantages, if it says that it reads or replaces them."""
    both = through(Pipeline({"first": first(), "second": second()}), random_batch(requires_grad=True))
    tokens = batch_for(second, requires_grad=True)
    a, start = applied(first, batch_for(first, requires_grad=True)), Signal.start(tokens)
    sees = reads_advantages(second)
    b = second()(tokens, replace(start, advantages=a.advantages) if sees else start)
    must(torch.equal(both.keep, a.keep & b.keep), "a token is kept that one of the two drops, or the other way round.")
    close(both.weight, a.weight * b.weight, "the weights are not multiplied.")
    close(both.rescale, a.rescale * b.rescale, "the rescalings are not multiplied.")
    close(scale_of(both), scale_of(a) * scale_of(b), "the scales of logits are not multiplied.")
    advantages = (b if sees else a).advantages
    must(torch.equal(both.advantages, advantages), "the advantages are not those of the last one that shapes them.")
    expected = [(f"first/{p.name}", p) for p in a.penalties] + [(f"second/{p.name}", p) for p in b.penalties]
    found = [p.name for p in both.penalties]
    must(found == [name for name, _ in expected], f"the penalties of the two are {found}.")
    for p, (name, q) in zip(both.penalties, expected, strict=True):
        must(
            p.coef == q.coef,
            f"the penalty {name} has the coefficient {p.coef}, and {q.coef} without the other plug-in.",
        )
        close(p.mean(tokens.mask), q.mean(tokens.mask), f"the penalty {name} changed.")


def reads_advantages(make: Make) -> bool:
    """Whether what earlier plug-ins made of the advantages matters to it, by what it says; True if it says nothing."""
    plugin = make()
    if not hasattr(plugin, "explain"):
        return True
    said = plugin.explain()
    return "advantages" in {*said.reads, *said.changes}


def has_a_finite_loss_and_both_audits(first: Make, second: Make) -> None:
    """The loss and its gradient are finite, and the series tell what each of the two touched."""
    logits = random_logits().requires_grad_()
    tokens = random_batch(requires_grad=True)
    signal = through(Pipeline({"first": first(), "second": second()}), tokens)
    loss = loss_from_signal(tokens, signal, logits=logits)
    must(loss.isfinite(), f"the loss of the two is {loss.item()}.")
    if loss.requires_grad:
        loss.backward()
        must(logits.grad is None or logits.grad.isfinite().all(), "the gradient of the two is not finite.")
    for name in ("first", "second"):
        keys = {f"plugin/{name}/touched", f"plugin/{name}/adv_mass"}
        must(keys <= signal.metrics.keys(), f"{keys - signal.metrics.keys()} is not in the series.")


def takes_no_notice_of_a_neutral_partner(first: Make, second: Make) -> None:
    """With either of the two at neutral, the loss of each token and the penalties are those of the other alone."""
    for make, neutral_first in ((first, False), (second, True)):
        partner = first if neutral_first else second
        neutral = partner().neutral
        if neutral is None:
            continue
        still = partial(partner, **neutral)
        two = {"still": still(), "acts": make()} if neutral_first else {"acts": make(), "still": still()}
        tokens = random_batch(requires_grad=True)
        pair, alone = through(Pipeline(two), tokens), through(Pipeline({"acts": make()}), tokens)
        inside = tokens.mask
        must(
            torch.equal(of_tokens(pair)[inside], of_tokens(alone)[inside]),
            f"at {neutral} it changes its partner's loss.",
        )
        close(_penalty(tokens, pair), _penalty(tokens, alone), f"at {neutral} it changes its partner's penalties.")


def _penalty(tokens: TokenBatch, signal: Signal) -> Tensor:
    return sum((p.coef * p.mean(tokens.mask) for p in signal.penalties), tokens.advantages.new_zeros(()))
