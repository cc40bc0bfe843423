"""How a run feeds its objective: batches, the policies that probabilities are taken from, what is left out, the evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig
from trl import GRPOConfig

from rl.explain.text import Row, count, listed, number
from rl.options import BatchAlgebra
from rl.pipeline import Pipeline
from rl.sparsity import Savings


def batch(args: GRPOConfig, algebra: BatchAlgebra) -> list[Row]:
    """What the batch sizes amount to."""
    n, per_group = algebra.completions_per_update, algebra.group
    updates, rollouts = algebra.updates_per_rollout, 1 / algebra.updates_per_rollout
    use = f"{count(int(updates), 'update')} from each" if updates >= 1 else f"{number(rollouts)} of them an update"
    if algebra.iterations > 1:
        use += f", every completion used {algebra.iterations} times (num_iterations)"
    return [
        (
            "update",
            f"{count(n, 'completion')} = {algebra.micro_batch} a forward x {algebra.accumulation} accumulated x {count(algebra.world, 'rank')}",
        ),
        (
            "rollout",
            f"{count(algebra.completions_per_rollout, 'completion')} = {count(algebra.prompts_per_rollout, 'prompt')} x {per_group}; {use}",
        ),
        ("tokens", f"at most {args.max_completion_length} a completion, {n * args.max_completion_length:,} an update"),
        (
            "updates",
            f"{args.max_steps:,}, {args.optim.value} at learning rate {args.learning_rate:g}, gradient norm at most {args.max_grad_norm:g}",
        ),
    ]


def policies(args: GRPOConfig, algebra: BatchAlgebra, path: str) -> Iterator[Row]:
    """Which weights and which distribution p, p_old and H are of."""
    yield (
        "p, H",
        (
            f"the policy in the forward of the update, all logits divided by {number(args.temperature)} (trainer.temperature), over the whole "
            "vocabulary; H in nats"
        ),
    )
    vllm = args.use_vllm and args.vllm_importance_sampling_correction
    if vllm:
        yield (
            "p_old, H_old",
            "the trainer's weights at the rollout, in a forward of their own; vLLM's own numbers only correct for it",
        )
    elif algebra.on_policy:
        yield "p_old, H_old", "the same: no update lies between a rollout and its use. The gradient is that of ln p"
    else:
        yield "p_old, H_old", "the policy at the rollout, recorded by a forward of its own"
    if not algebra.on_policy:
        last = algebra.updates_per_rollout
        yield (
            "off-policy",
            (
                f"the first update from a rollout has p = p_old, the last of {last:g} is {last - 1:g} updates away: ratios clip, and what "
                "reads p or H moves while what reads p_old or H_old stays"
            ),
        )
    if limits := _limits(args):
        yield (
            "sampling",
            f"{limits} cut what is drawn; p, p_old and H stay those of the whole vocabulary, so r is not exact there",
        )
    yield "start", f"{path}"


def _limits(args: GRPOConfig) -> str:
    found = []
    if args.top_p < 1:
        found.append(f"top_p={number(args.top_p)}")
    if args.top_k:
        found.append(f"top_k={args.top_k}")
    if args.min_p:
        found.append(f"min_p={number(args.min_p)}")
    return listed(found) if found else ""


def recorded(args: GRPOConfig, algebra: BatchAlgebra, needs: frozenset[str], backend: str) -> bool:
    """Whether logp and entropy of the rollout's tokens are known before the forward (docs/performance.md)."""
    old_pass = not algebra.on_policy or (args.use_vllm and args.vllm_importance_sampling_correction)
    return backend == "native" or old_pass or "rollout_entropy" in needs


def left_out(args: GRPOConfig, algebra: BatchAlgebra, pipeline: Pipeline, backend: str) -> list[Row]:
    """What is not computed because its gradient is zero, and what stands against computing less."""
    bonus = args.use_adaptive_entropy or bool(args.entropy_coef)
    terms = pipeline.needs | ({"entropy.grad"} if bonus else set())
    savings = Savings.of(args, terms, pipeline.promises, aux_loss=False, dropout=False)
    ahead = savings.tokens and recorded(args, algebra, pipeline.needs, backend)
    rows: list[Row] = []
    if ahead:
        when = "" if algebra.on_policy or savings.stale else ", in the first update from a rollout"
        rows.append(
            ("tokens", f"no forward of the head where A x weight x keep is 0{when}: the term is 0 whatever p is")
        )
        why = (
            "all that the plug-ins read" if savings.stale else "what the forward would give, the policy being the same"
        )
        rows.append(("", f"that is known beforehand from what the rollout recorded, which is {why}"))
    if savings.rows:
        later = (
            "" if algebra.on_policy or savings.stale else " in the first update from a rollout, and no backward later"
        )
        how = f"no forward{later}" if ahead else "a forward, but no backward"
        rows.append(("completions", f"{how} where A is 0: the term is 0 whatever p is"))
    if against := list(_against(args, pipeline, bonus)):
        rows.append(("no more", f"{listed(against)} may give gradient to a token without advantage"))
    elif not ahead:
        rows.append(("no more", _unknown_before(args, savings)))
    rows.append(("the head", "no backward for a token whose gradient is 0, whatever made it so"))
    rows.append(("padding", "no column that no scored token can see"))
    if savings.rows:
        rows.append(("", "a model with dropout or a balance loss of experts leaves out less"))
    return rows


def _unknown_before(args: GRPOConfig, savings: Savings) -> str:
    """Why a token's share in the gradient is known only in the forward."""
    if savings.tokens:
        return "nobody records the rollout's entropies, which rollout=native, or a plug-in of scope=rollout, would"
    if args.off_policy_mask_threshold is not None:
        return "off_policy_mask_threshold looks at all tokens of a completion"
    return "a ratio of importance_sampling_level=sequence is made of all tokens of a completion"


def _against(args: GRPOConfig, pipeline: Pipeline, bonus: bool) -> Iterator[str]:
    if args.beta:
        yield f"the KL term (trainer.beta={number(args.beta)})"
    if bonus:
        yield "the entropy bonus"
    for name, plugin in pipeline.plugins.items():
        if penal := plugin.needs & {"logp.grad", "entropy.grad", "full_kl", "zero_advantage", "logit_scale"}:
            yield f"plugin.{name} ({', '.join(sorted(penal))})"
    for name, plugin in pipeline.shadows.items():
        if "full_kl" in plugin.needs:
            yield f"the shadow {name} (full_kl)"


def evaluation(node: DictConfig, args: GRPOConfig) -> list[Row]:
    """The settings in one line each."""
    when = [word for word, on in (("before", node.before), ("after", node.after)) if on]
    sets = listed(node.sets) if node.sets else "the data's held-out problems"
    how = "greedy" if node.temperature == 0 else f"temperature {number(node.temperature)}, top_p {number(node.top_p)}"
    return [
        (
            "samples",
            f"{node.samples} a problem at {how}, at most {node.max_new_tokens} tokens{' and a greedy one' if node.greedy else ''}; "
            f"{'all' if node.limit is None else f'the first {node.limit}'} of {sets}",
        ),
        (
            "metrics",
            f"pass@k and maj@k for k = {listed(map(str, node.ks))}; {f'{listed(when)} training' if when else 'not in training'}",
        ),
    ]
