"""The plug-ins of a run, each as it explains itself, and what their order means."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Literal

from trl import GRPOConfig

from rl.contract import Explanation, Scope, TokenPlugin
from rl.explain.text import Row, count, listed, number
from rl.options import BatchAlgebra
from rl.pipeline import Pipeline

_READS = {
    "advantages": "A",
    "logp": "p",
    "entropy": "H",
    "old_logp": "p_old",
    "old_entropy": "H_old",
    "rank": "rank (of the token under p)",
    "ref_logp": "p_ref",
    "full_kl": "KL(p, p_ref) (of the whole vocabulary, p_ref the starting model's)",
    "rollout_entropy": "H_old of the whole rollout",
    "reward": "the reward",
    "group": "the prompt's group",
}
_CURRENT = {"logp", "entropy", "rank", "full_kl"}


def plugins(pipeline: Pipeline, args: GRPOConfig, algebra: BatchAlgebra) -> dict[str, list[Row]]:
    """A section for each plug-in, in order, shadows last."""
    if not pipeline.plugins and not pipeline.shadows:
        return {"Plug-ins": [("none", "plain GRPO")]}
    sections = {}
    for place, (name, plugin) in enumerate(pipeline.plugins.items(), start=1):
        sections[f"Plug-in {place}: {name}"] = list(_plugin(plugin, args, algebra))
    sections["Together"] = list(_together(pipeline))
    for name, plugin in pipeline.shadows.items():
        rows = [
            ("a shadow", "measures what it would do to plain GRPO, and changes nothing"),
            *_plugin(plugin, args, algebra),
        ]
        sections[f"Shadow: {name}"] = rows
    return sections


def explanation(plugin: TokenPlugin) -> Explanation | None:
    """What a plug-in says of itself, None for one that does not."""
    return plugin.explain() if hasattr(plugin, "explain") else None


def effect(plugin: TokenPlugin) -> str:
    """The first sentence of its docstring."""
    text = " ".join((inspect.getdoc(type(plugin)) or "it has no docstring").split("\n\n")[0].split())
    return text.rstrip(".").replace("`", "")


def _plugin(plugin: TokenPlugin, args: GRPOConfig, algebra: BatchAlgebra) -> Iterator[Row]:
    yield "effect", effect(plugin)
    said = explanation(plugin)
    if said is None:
        own = listed(sorted(plugin.needs)) if plugin.needs else "nothing beyond what every batch has"
        yield "needs", own
        yield "", "more is not known: it has no explain() (docs/your-own-method.md)"
        return
    for place, line in enumerate(said.formula):
        yield ("" if place else "formula"), line
    for name, scope in said.statistics.items():
        yield name, f"over {_scope(scope, algebra)} ({scope})"
    yield "reads", _reads(said, plugin, args, algebra)
    yield from _denominator(said, algebra)
    for place, line in enumerate(said.differs):
        yield ("" if place else "differs"), line


def _scope(scope: Scope | Literal["group"], algebra: BatchAlgebra) -> str:
    """The tokens of a scope, with their completions counted."""
    ranks, micro = algebra.world, algebra.micro_batch
    own, all_of_them = (" on one rank", f" on all {ranks} ranks") if ranks > 1 else ("", "")
    return {
        "response": "the tokens of its completion",
        "group": f"the {algebra.group} completions of its prompt, at the rollout",
        "micro": f"the tokens of the {count(micro, 'completion')} of one forward{own}",
        "world": f"the tokens of the {count(micro * ranks, 'completion')} of one forward{all_of_them}",
        "rollout": f"the tokens of all {count(algebra.completions_per_rollout, 'completion')} of the rollout, as recorded there",
    }[scope]


def _reads(said: Explanation, plugin: TokenPlugin, args: GRPOConfig, algebra: BatchAlgebra) -> str:
    if not said.reads:
        return "nothing"
    text, moving = listed(map(_word, said.reads)), [field for field in said.reads if field in _CURRENT]
    if not moving or algebra.on_policy:
        return f"{text}, fixed at the rollout"
    updates = f"each of the {algebra.updates_per_rollout:g} updates from a rollout"
    rest = "" if len(moving) == len(said.reads) else ", the rest is fixed at the rollout"
    return f"{text}; off-policy {listed(map(_word, moving))} {'is' if len(moving) == 1 else 'are'} another one in {updates}{rest}"


def _word(field: str) -> str:
    return _READS.get(field, field)


def _denominator(said: Explanation, algebra: BatchAlgebra) -> Iterator[Row]:
    if said.denominator == "kept":
        yield "denominator", "the loss x n_all / n_kept: where L divides by tokens, by the kept ones of that scope"
    else:
        yield "denominator", "as above, of all tokens: a token that is dropped or weighs less still counts"
    for name, (coef, over) in said.penalties.items():
        tokens = "all tokens" if over == "all" else "selected tokens"
        yield f"penalty {name}", f"L + {number(coef)} x its sum over the selected tokens / the number of {tokens}"
    if said.penalties:
        over = f", averaged over the {algebra.accumulation} forwards of the update" if algebra.accumulation > 1 else ""
        yield "", f"counts are those of {_scope('world', algebra).removeprefix('the tokens of ')}{over}"


def _together(pipeline: Pipeline) -> Iterator[Row]:
    """What several do to a token, and where their order matters."""
    if not pipeline.plugins:
        return
    told = {name: explanation(plugin) for name, plugin in pipeline.plugins.items()}
    known = [said for said in told.values() if said is not None]
    changed = (
        {field for said in known for field in said.changes}
        if len(known) == len(told)
        else {"advantages", "weight", "keep"}
    )
    factors = ["A as the last plug-in shaped it" if "advantages" in changed else "A"]
    factors += ["the product of the weights"] if "weight" in changed else []
    factors += ["1[kept by all that mask]"] if "keep" in changed else []
    factors += ["n_all / n_kept"] if any(said.denominator == "kept" for said in known) else []
    yield "A in lᵢₜ is", " x ".join(factors)
    if "logit_scale" in changed:
        yield "p in lᵢₜ is", "of the scaled logits, and so is p_old"
    if len(told) > 1:
        yield "order", order(told)
        yield "statistics", "are over all tokens, also those that an earlier plug-in dropped"


def order(told: Mapping[str, Explanation | None]) -> str:
    """Who sees what of whose advantages, for plug-ins in the order they run; None for one that cannot explain itself."""
    if unknown := [name for name, said in told.items() if said is None]:
        return f"not known to matter or not: {listed(unknown)} cannot say what it reads"
    seen = [
        sentence
        for (name, first), (later, second) in combinations(told.items(), 2)
        if (sentence := _seen(name, first, later, second))
    ]
    return (
        "; ".join(seen)
        if seen
        else "does not matter: masks are and-ed, weights multiplied, and no one reads what another changes"
    )


def _seen(name: str, first: Explanation, later: str, second: Explanation) -> str:
    """What of the advantages one sees of the other; empty where their order does not matter."""
    reads = "advantages" in second.reads
    if "advantages" in first.changes and (reads or "advantages" in second.changes):
        return f"{later} {'reads' if reads else 'replaces'} the advantages that {name} shaped"
    if "advantages" in first.reads and "advantages" in second.changes:
        return f"{name} reads the advantages before {later} {'shapes' if reads else 'replaces'} them"
    return ""
