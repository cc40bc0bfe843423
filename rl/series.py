"""TRL's own metrics as entrl's series: under entrl's names, each with one meaning, of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_NAMES = {
    "loss": "policy/loss",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/lr",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "rollout/zero_std_groups",
    "completions/mean_length": "rollout/len",
    "completions/max_length": "rollout/len_max",
    "completions/clipped_ratio": "rollout/truncated",
}

# Dropped: TRL averages the means of micro-batches or ranks, whatever they are means of, where entrl adds up sums and counts
# under a name of its own (rl.meter): kl, rewards, sampling/*/mean, and clip ratios, which also count tokens that a plug-in
# masked as not clipped. Its entropy is 0.0 for a micro-batch whose completions are all truncated and masked, which looks like
# a collapse (trl 1.16). The others say again what rollout/len, time/* and reward/* say.
_DROPPED = {"entropy", "epoch", "num_tokens", "step_time", "total_flos", "mean_token_accuracy"}
_DROPPED |= {"kl", "reward", "cispo_clip_ratio"}
_DROPPED |= {"sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"}
_DROPPED_PREFIXES = ("clip_ratio/", "completions/", "profiling/", "rewards/")

# Of several rollouts in a step; all others are averaged, each being of equally many completions.
_EXTREMES = {
    "completions/max_length": max,
    "sampling/sampling_logp_difference/max": max,
    "sampling/importance_sampling_ratio/max": max,
    "sampling/importance_sampling_ratio/min": min,
}


def of_step(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """TRL's values of one step, each already of all ranks, as one number a name; NaN and names without a value are left out."""
    found = {name: [v for v in vs if not math.isnan(v)] for name, vs in values.items()}
    return {name: _EXTREMES[name](vs) if name in _EXTREMES else sum(vs) / len(vs) for name, vs in found.items() if vs}


def rename(metrics: Mapping[str, float]) -> dict[str, float]:
    """One step's TRL metrics under entrl's names, without those that entrl counts itself.

    Metrics a reward function logs itself keep their name.
    """
    out = {}
    for name, value in metrics.items():
        if name in _NAMES:
            out[_NAMES[name]] = float(value)
        elif name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES):
            out[name] = float(value)
    return out
