"""The series of every run: what each is called on a page, and what to look for in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Axis = Mapping[str, Any]  # of Plotly
FREE: Axis = {}
FROM_0: Axis = {"rangemode": "tozero"}
SHARE: Axis = {"rangemode": "tozero", "tickformat": ".2~%"}
NATS: Axis = {"rangemode": "tozero", "title": {"text": "nats"}}

# What is plainly a line or some: name, title, what to look for, {series: label}, y axis, why it may be missing.
Plain = tuple[str, str, str, Mapping[str, str], Axis, str]
REWARD: tuple[Plain, ...] = (
    (
        "reward_std",
        "Spread of the reward",
        "Advantages are made of it: as it goes to 0, nothing is left to learn from.",
        {"reward/std": "standard deviation"},
        FROM_0,
        "no step has reward/std",
    ),
    (
        "live_groups",
        "Groups that teach something",
        "Share of groups whose rewards differ. Low early: the task is too hard. Falling late: it becomes too easy.",
        {"live groups": "live groups"},
        SHARE,
        "no step has rollout/zero_std_groups",
    ),
)
ENTROPY: tuple[Plain, ...] = (
    (
        "entropy_kept",
        "Entropy of kept and dropped tokens",
        "Far apart: the method does pick uncertain tokens. Closing in: its choice gets arbitrary.",
        {"entropy/kept": "kept", "entropy/dropped": "dropped"},
        NATS,
        "no plug-in of this run drops tokens",
    ),
    (
        "entropy_sign",
        "Entropy by sign of the advantage",
        "Tokens of good completions against those of bad ones. A lower blue line: success comes from where the model is sure.",
        {"entropy/positive_advantage": "good completions", "entropy/negative_advantage": "bad completions"},
        NATS,
        "no step has tokens with an advantage",
    ),
    (
        "entropy_position",
        "Entropy by position",
        "Quarters of each completion. A first quarter that falls to the others: openings become all the same.",
        {f"entropy/position_q{q}": f"{name} quarter" for q, name in enumerate(("first", "second", "third", "last"), 1)},
        NATS,
        "no step has entropy/position_q1 to q4",
    ),
    (
        "entropy_quantiles",
        "The uncertain end",
        "The top fifth of the tokens are where decisions fall; exploration ends when these fall, whatever the mean does.",
        {
            "entropy/top20_mean": "mean of the top 20 %",
            "entropy/p95": "95th percentile",
            "entropy/p80": "80th percentile",
        },
        NATS,
        "no step has entropy/top20_mean",
    ),
    (
        "entropy_above",
        "Tokens as uncertain as the start's top fifth",
        "20 % by definition at the start. What is left of it is what is left of the starting model's forks.",
        {"entropy/above_reference_p80": "share of tokens"},
        SHARE,
        "it needs the evaluation before training (eval.before=true)",
    ),
)
COMPLETIONS: tuple[Plain, ...] = (
    (
        "length",
        "Completion length",
        "Tokens. Steady growth is common in reasoning; a jump, or a fall to almost nothing, is a reward being gamed.",
        {"rollout/len": "mean", "rollout/len_max": "longest"},
        FROM_0,
        "no step has rollout/len",
    ),
    (
        "truncated",
        "Cut off at the limit",
        "Share of completions without an end. Above some per cent: raise trainer.max_completion_length.",
        {"rollout/truncated": "truncated"},
        SHARE,
        "no step has rollout/truncated",
    ),
    (
        "distinct",
        "Different answers in a group",
        "How much a group still explores. It falls as the model gets sure, rightly or not.",
        {"rollout/distinct_answers": "distinct answers"},
        FROM_0,
        "the data names no function that finds answers (data.answers)",
    ),
)
UPDATE: tuple[Plain, ...] = (
    (
        "clip",
        "Clipped tokens",
        "Share whose gradient PPO's clip stops; 0 where each rollout is used once. Above some per cent: updates are too large.",
        {"policy/clip_high": "at the upper bound", "policy/clip_low": "at the lower bound"},
        SHARE,
        "its loss type clips nothing, or no step logged it",
    ),
    (
        "kl",
        "KL to the reference model",
        "How far the policy has moved. A slow rise is learning; a sudden one often comes before a collapse.",
        {"policy/kl": "KL per token"},
        FROM_0,
        "it is computed where trainer.beta is above 0",
    ),
    (
        "grad_norm",
        "Gradient norm",
        "Before clipping to trainer.max_grad_norm. Spikes are rare batches; steady growth is instability.",
        {"policy/grad_norm": "gradient norm"},
        FROM_0,
        "no step has policy/grad_norm",
    ),
    ("lr", "Learning rate", "As scheduled.", {"policy/lr": "learning rate"}, FROM_0, "no step has policy/lr"),
    (
        "loss",
        "Loss",
        "As it is optimised. On-policy it is near 0 by construction and says nothing about progress.",
        {"policy/loss": "loss"},
        FREE,
        "no step has policy/loss",
    ),
    (
        "compute",
        "Tokens that the update computed",
        "Live: with an advantage other than 0. Scored: what logits were computed for. The rest cost nothing.",
        {"compute/scored": "scored", "compute/live": "live"},
        SHARE,
        "no step has compute/scored",
    ),
)
COST: tuple[Plain, ...] = (
    (
        "seconds",
        "Seconds a step",
        "The rollout's share is what faster generation could save. Slow drift goes with completion length.",
        {"time/step": "step", "time/rollout": "of it rollout"},
        FROM_0,
        "no step has time/step",
    ),
    (
        "tokens_per_second",
        "Completion tokens per second",
        "Of all ranks together. Dips that come back are checkpoints or a shared machine.",
        {"time/tokens_per_second": "tokens/s"},
        FROM_0,
        "no step has time/tokens_per_second",
    ),
    (
        "memory",
        "Peak GPU memory",
        "GiB, highest so far of the fullest rank. A staircase that goes on ends in an out-of-memory error.",
        {"mem/peak_gib": "GiB"},
        FROM_0,
        "the run had no GPU",
    ),
)
UNSEEN = {"time/at", "entropy/p50", "rollout/zero_std_groups"}  # a clock, and what other charts show in another form
