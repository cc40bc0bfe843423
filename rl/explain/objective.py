"""TRL's loss and advantage in formulas, as ``GRPOTrainer._compute_loss`` of trl 1.16 has them.

``tests/rl/test_rl_explain.py`` reads the numbers back from the text and computes each loss with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trl import GRPOConfig

from rl.explain.text import Row, count, listed, number
from rl.options import BatchAlgebra

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def objective(args: GRPOConfig, algebra: BatchAlgebra, adapters: bool, train_share: float) -> list[Row]:
    """What is minimised: the mean, the token's term, the ratio, and everything that is added.

    Args:
        adapters: PEFT is trained. train_share: of each group's completions, the others only vote.
    """
    return [
        *_mean(args, algebra),
        *_term(args),
        *_ratio(args, algebra),
        *_kl(args, adapters),
        *_entropy_bonus(args),
        *_corrections(args),
        ("tokens", _tokens(args, train_share)),
    ]


def _tokens(args: GRPOConfig, train_share: float) -> str:
    text = "completion tokens up to the end of text, which is one of them; prompts, padding and tool results are not"
    if args.mask_truncated_completions:
        text += "; a completion cut off before its end of text has none (mask_truncated_completions), but counts in its group"
    if train_share < 1:
        text += f"; the last {1 - train_share:.4g} of each group only vote and have none"
    return text


def _mean(args: GRPOConfig, algebra: BatchAlgebra) -> Iterator[Row]:
    """The sum over tokens and its denominator, over all micro-batches and ranks of one update."""
    n, micro = algebra.completions_per_update, algebra.accumulation * algebra.world
    completions = f"the {count(n, 'completion')} of the update"
    if args.loss_type in ("grpo", "sapo"):
        yield "L", "1/n Σᵢ 1/Nᵢ Σₜ lᵢₜ"
        yield "n", f"{n}: {completions}"
        yield "Nᵢ", "tokens of completion i: every completion weighs the same, a token of a long one less"
    elif args.loss_type == "luspo":
        yield "L", "1/n Σᵢ Σₜ lᵢₜ"
        yield "n", f"{n}: {completions}; nothing is divided by their length"
    elif args.loss_type == "dr_grpo":
        top = args.max_completion_length
        yield "L", "1/D Σᵢ Σₜ lᵢₜ"
        yield "D", f"{n * top} = {n} x {top}: {completions} x max_completion_length, however long they are"
    elif args.loss_type == "bnpo":
        yield "L", "1/m Σ_b 1/N_b Σ lᵢₜ over the tokens of micro-batch b"
        yield (
            "m",
            f"{micro}: micro-batches of the update, of {count(algebra.micro_batch, 'completion')} on one rank each",
        )
        yield "N_b", "tokens of micro-batch b: a token in a micro-batch of short completions weighs more"
    else:
        yield from _by_tokens(algebra, completions)


def _by_tokens(algebra: BatchAlgebra, completions: str) -> Iterator[Row]:
    """dapo, cispo, vespo: TRL divides by the tokens of the rollout, scaled to one update."""
    per_update, per_rollout = algebra.accumulation, algebra.steps_per_generation
    rollout = algebra.completions_per_rollout
    if per_update == per_rollout:
        yield "L", "1/N Σᵢ Σₜ lᵢₜ"
        yield "N", f"all tokens of {completions}, on all ranks: every token weighs the same"
    elif per_update < per_rollout:
        yield "L", "1/N Σᵢ Σₜ lᵢₜ"
        yield (
            "N",
            (
                f"all tokens of the {count(rollout, 'completion')} of the rollout x {per_update}/{per_rollout}: the average update's, not the "
                "tokens of this one"
            ),
        )
    else:
        yield "L", f"{per_rollout}/{per_update} Σ_j 1/N_j Σ lᵢₜ over the tokens of rollout j"
        yield "N_j", f"all tokens of rollout j, {count(rollout, 'completion')}: every rollout weighs the same"


def _term(args: GRPOConfig) -> Iterator[Row]:
    """The term of one token, and what its gradient is while the policy is the rollout's."""
    low, high = number(1 - args.epsilon), number(1 + _high(args))
    kind = args.loss_type
    if kind in _CLIPPED:
        first = "r A" if args.delta is None else f"min(r, {number(args.delta)}) A"
        yield "lᵢₜ", f"-min({first}, clip(r, {low}, {high}) A)"
        yield "its gradient", f"-r A ∇ln p; 0 where A > 0 and r > {high}, or A < 0 and r < {low}"
        if args.delta is not None:
            yield "", f"and 0 where A < 0 and r > {number(args.delta)}"
    elif kind == "cispo":
        cap = _high(args)
        yield "lᵢₜ", f"-min(r, {number(cap)}) A ln p, no gradient through min(r, {number(cap)})"
        yield "its gradient", f"-min(r, {number(cap)}) A ∇ln p: the ratio is capped, no token is dropped"
        if cap <= 1:
            yield (
                "",
                f"epsilon_high caps the ratio itself here: {number(cap)} caps every token on-policy too; 5 is usual",
            )
    elif kind == "sapo":
        up, down = number(args.sapo_temperature_pos), number(args.sapo_temperature_neg)
        yield "lᵢₜ", f"-(4/τ) σ(τ (r - 1)) A,  τ = {up} where A > 0, else {down}; σ is the sigmoid"
        yield "its gradient", "-4 σ(u) (1 - σ(u)) r A ∇ln p,  u = τ (r - 1): it fades smoothly, nothing is clipped"
    else:
        up = f"k = {number(args.vespo_k_pos)}, λ = {number(args.vespo_lambda_pos)} where A >= 0"
        down = f"k = {number(args.vespo_k_neg)}, λ = {number(args.vespo_lambda_neg)}"
        yield "lᵢₜ", f"-φ(w) A ln p,  φ(w) = exp(λ + k ln w - λ w) without gradient;  {up}, else {down}"
        yield "w", "Πₜ p/p_old of the whole completion, from 1e-8 to e^20; φ(1) = 1"
        yield "its gradient", "-φ(w) A ∇ln p"


def _high(args: GRPOConfig) -> float:
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def _ratio(args: GRPOConfig, algebra: BatchAlgebra) -> Iterator[Row]:
    if args.loss_type == "vespo" and not (args.beta and args.use_bias_correction_kl):
        return
    if args.importance_sampling_level == "sequence":
        yield "r", "exp(mean over the completion's tokens of ln p - ln p_old): one number a completion"
        yield "", "its gradient is r times the mean of ∇ln p over those tokens, in place of r ∇ln p"
    else:
        yield "r", "p / p_old of the token"
    if algebra.on_policy:
        yield "", "on-policy: r = 1 in value at every update, so nothing is clipped"


def _kl(args: GRPOConfig, adapters: bool) -> Iterator[Row]:
    if args.beta == 0:
        yield "KL", "none (trainer.beta=0), no reference model"
        return
    times = "r (exp(d) - d - 1)" if args.use_bias_correction_kl else "exp(d) - d - 1"
    yield "KL", f"lᵢₜ + {number(args.beta)} k,  k = {times},  d = ln p_ref - ln p (estimator k3)"
    yield "", "on every token and with the denominator above: no plug-in masks or weighs it"
    yield "p_ref", reference(args, adapters)


def reference(args: GRPOConfig, adapters: bool) -> str:
    """Which policy the KL is taken to."""
    if adapters:
        return "the model without its adapters"
    if args.sync_ref_model:
        a = args.ref_model_mixup_alpha
        return f"every {count(args.ref_model_sync_steps, 'step')} {number(a)} policy + {number(1 - a)} of what it was"
    return "the model that training starts from"


def _entropy_bonus(args: GRPOConfig) -> Iterator[Row]:
    coef = number(args.entropy_coef)
    if args.use_adaptive_entropy:
        yield (
            "entropy bonus",
            (
                f"L - c mean H,  c = {coef} at first; while the last update's mean H <= {number(args.entropy_target)} it is applied and grows by "
                f"{number(args.entropy_coef_delta)} up to {number(args.entropy_coef_max)}, else it is 0 and shrinks to {number(args.entropy_coef_min)}"
            ),
        )
    elif args.entropy_coef:
        yield "entropy bonus", f"L - {coef} mean H"
    else:
        yield "entropy bonus", "none (trainer.entropy_coef=0)"
        return
    yield "", "a mean over the tokens of a micro-batch on one rank; those means are averaged, whatever the loss type"


def _corrections(args: GRPOConfig) -> Iterator[Row]:
    """What TRL multiplies the token's term with, and what a model may add."""
    if args.off_policy_mask_threshold is not None:
        limit = number(args.off_policy_mask_threshold)
        yield "stale masks", f"x 0 for completions of A < 0 whose mean ln p_rollout - ln p is above {limit}"
    if args.use_vllm and args.vllm_importance_sampling_correction:
        level, _, kind = args.vllm_importance_sampling_mode.partition("_")
        of = "of a token" if level == "token" else "of a completion, the product of its tokens'"
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        ends = [f"below {number(low)}"] if low is not None else []
        ends += [f"above {number(high)}"] if high is not None else []
        rule = f"{'clipped' if kind == 'truncate' else '0'} {listed(ends)}" if ends else "without a limit"
        how = "inside w" if args.loss_type == "vespo" else "multiplies lᵢₜ, not the KL"
        yield "vLLM", f"p_old / p_vLLM {of}, {rule}, {how}"
    if args.router_aux_loss_coef != 0:
        coef = "the model's own coefficient" if args.router_aux_loss_coef is None else number(args.router_aux_loss_coef)
        yield "experts", f"a mixture of experts adds its balance loss x {coef}; others add nothing"


def advantage(
    args: GRPOConfig, algebra: BatchAlgebra, rewards: Mapping[str, tuple[float, str | None, float]], train_share: float
) -> list[Row]:
    """How rewards become A. Args: rewards: name -> weight, its gate or None, and the gate's least value."""
    group, rollout = algebra.group, algebra.completions_per_rollout
    terms = " + ".join(f"{number(weight)} {name}" for name, (weight, _, _) in rewards.items())
    rows: list[Row] = []
    among = f"the {count(group, 'completion')} of one prompt"
    if train_share < 1:
        among = (
            f"the first {round(train_share * group)} of the {group} completions of one prompt, the only ones trained on"
        )
    if args.multi_objective_aggregation == "normalize_then_sum":
        rows.append(("A", "(x - mean x) / (s + 0.0001),  mean and s over the whole rollout"))
        rows.append(("x", f"{terms}, each reward before its weight as (R - mean) / (s + 0.0001) over {among}"))
        rows.append(("", f"the rollout has {count(rollout, 'completion')} on all ranks; scale_rewards has no say here"))
    elif args.scale_rewards == "none":
        rows.append(("A", f"R - mean R,  the mean over {among}"))
    else:
        over = among if args.scale_rewards == "group" else f"the {count(rollout, 'completion')} of the rollout"
        rows.append(("A", f"(R - mean R) / (s + 0.0001),  the mean over {among}"))
        rows.append(("s", f"the sample deviation of R (n - 1) over {over}"))
    if args.multi_objective_aggregation != "normalize_then_sum":
        rows.append(("R", terms))
    for name, (_, gate, least) in rewards.items():
        if gate is not None:
            rows.append(("", f"{name} is 0 where {gate} is below {number(least)}"))
    rows.append(("", "a group of equal rewards has A = 0 and teaches nothing"))
    return rows
