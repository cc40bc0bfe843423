"""The names of the series: TRL's metrics under entrl's names, each with one meaning."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "loss": "policy/loss",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/lr",
    "kl": "policy/kl",
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "rollout/zero_std_groups",
    "completions/mean_length": "rollout/len",
    "completions/max_length": "rollout/len_max",
    "completions/clipped_ratio": "rollout/truncated",
}

# Dropped: TRL's entropy is logged as 0.0 for a micro-batch whose completions are all truncated and masked, which looks like
# a collapse (trl 1.16), and its clip ratios count tokens that a plug-in masked as not clipped. entrl has its own series.
# The others say again what rollout/len, time/* and reward/* say.
_DROPPED = {"entropy", "epoch", "num_tokens", "step_time", "total_flos", "mean_token_accuracy"}
_DROPPED_PREFIXES = ("clip_ratio/", "completions/", "profiling/")


def rename(metrics: Mapping[str, float]) -> dict[str, float]:
    """One step's TRL metrics under entrl's names; ``rewards/<name>/mean`` becomes ``reward/<name>``.

    Metrics a reward function logs itself keep their name.
    """
    out = {}
    for name, value in metrics.items():
        if name in _NAMES:
            out[_NAMES[name]] = float(value)
        elif name.startswith("rewards/"):
            if name.endswith("/mean"):
                out["reward/" + name.removeprefix("rewards/").removesuffix("/mean")] = float(value)
        elif name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES):
            out[name] = float(value)
    return out
