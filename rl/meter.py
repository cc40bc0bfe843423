"""Sums, counts and seconds of one optimizer step, added up over micro-batches and ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from trl import GRPOConfig

from rl.contract import Cosine, Mean
from rl.reduce import all_max, all_sum, gather, union


class Meter:
    """Collects what happens between two logs.

    Means are over all ranks' counts; seconds and memory are those of the slowest and the fullest rank; tokens are everyone's.

    Args:
        device: where sums over ranks are made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, Cosine] = {}  # a mean is one too: total / sqrt(count x count)
        self._since, self._rollout, self._tokens = time.perf_counter(), 0.0, 0.0
        self._totals = [0.0, 0.0, 0.0]  # tokens, rollout seconds, wall seconds

    def start(self) -> None:
        """The clock begins now."""
        self._since = time.perf_counter()

    def add(self, means: Mapping[str, Mean | Cosine]) -> None:
        """Add to the step's means and cosines by name."""
        for name, mean in means.items():
            own = Cosine(*mean, mean.count) if isinstance(mean, Mean) else mean
            before = self._sums.get(name)
            self._sums[name] = own if before is None else Cosine(*(a + b for a, b in zip(before, own, strict=True)))

    def add_rollout(self, seconds: float, tokens: float) -> None:
        """One rollout took so long and gave so many completion tokens on this rank."""
        self._rollout += seconds
        self._tokens += tokens

    def flush(self) -> dict[str, float]:
        """The step's means, cosines and times; every rank must call it, whatever it has seen. A mean of nothing is left out."""
        return self._flush_means() | self._flush_clock()

    def _flush_means(self) -> dict[str, float]:
        names = union(self._sums, self.device)  # a plug-in may log something on one rank only
        own = torch.zeros(len(names), 3, dtype=torch.float64, device=self.device)
        for place, name in enumerate(names):
            if name in self._sums:
                own[place] = torch.stack([torch.as_tensor(v, device=self.device).double() for v in self._sums[name]])
        self._sums = {}
        sums = zip(names, all_sum(own).tolist(), strict=True)
        return {name: total / math.sqrt(a * b) for name, (total, a, b) in sums if a * b > 0}

    def _flush_clock(self) -> dict[str, float]:
        now = time.perf_counter()
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        own = [now - self._since, self._rollout, peak]
        slowest = all_max(torch.tensor(own, dtype=torch.float64, device=self.device)).tolist()
        wall, rollout, peak = slowest
        tokens = all_sum(torch.tensor([self._tokens], dtype=torch.float64, device=self.device)).item()
        self._since, self._rollout, self._tokens = now, 0.0, 0.0
        self._totals = [total + new for total, new in zip(self._totals, (tokens, rollout, wall), strict=True)]
        times = {"time/step": wall, "time/rollout": rollout, "time/tokens_per_second": tokens / wall}
        return times | ({"mem/peak_gib": peak} if gpu else {})

    def tokens_per_second(self) -> dict[str, float]:
        """Completion tokens over the whole training: per second of rollout, and per second of everything."""
        tokens, rollout, wall = self._totals
        return {"rollout": tokens / max(rollout, 1e-9), "train": tokens / max(wall, 1e-9)}


def policy_means(
    inputs: Mapping[str, Tensor], mask: Tensor, logp: Tensor, scored: Tensor, live: Tensor, args: GRPOConfig
) -> dict[str, Mean]:
    """Clip shares of the ``scored`` tokens, KL over ``mask``, and the shares of ``mask`` that were scored or may get gradient.

    TRL's own would average the means of micro-batches, and count a token that a plug-in masked as not clipped, its advantage
    being 0: ``inputs["advantages"]`` are those before the plug-ins. All others are (B, T).
    """
    ratio, advantages = _ratio(inputs.get("old_per_token_logps"), logp.detach(), mask, args), inputs["advantages"]
    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    means = {"compute/scored": Mean.of(scored.float(), mask), "compute/live": Mean.of(live.float(), mask)}
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type in _CLIPPED:
        low = (ratio < 1 - args.epsilon) & (advantages < 0)
        means["policy/clip_low"] = Mean.of(low.float(), scored & mask)
    if args.loss_type in (*_CLIPPED, "cispo"):
        limit = high if args.loss_type == "cispo" else 1 + high
        means["policy/clip_high"] = Mean.of(((ratio > limit) & (advantages > 0)).float(), scored & mask)
    if (ref_logp := inputs.get("ref_per_token_logps")) is not None:
        behind = ref_logp - logp.detach()
        kl = behind.exp() - behind - 1
        means["policy/kl"] = Mean.of(kl * ratio if args.use_bias_correction_kl else kl, mask)
    return means


_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def _ratio(old_logp: Tensor | None, logp: Tensor, mask: Tensor, args: GRPOConfig) -> Tensor:
    """The importance weights of the loss, (B, T): a token's own, or its completion's."""
    if old_logp is None:
        return torch.ones_like(logp)
    log_ratio = logp - old_logp
    if args.importance_sampling_level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(logp)
    return log_ratio.exp()


def reward_means(rewards: Tensor, names: Sequence[str], weights: Tensor) -> dict[str, Mean]:
    """Means of this rank's (completions, functions) rewards; a NaN, from a function that gave none, is not counted."""
    known = ~rewards.isnan()
    total = (rewards * weights).nansum(-1)
    means = {f"reward/{name}": Mean.of(rewards[:, i].nan_to_num(), known[:, i]) for i, name in enumerate(names)}
    return {"reward/mean": Mean.of(total, known.any(-1)), **means}


def sampling_means(output: Mapping[str, Tensor], mask: Tensor) -> dict[str, Mean]:
    """How far vLLM's probabilities are from the trainer's, over the tokens in ``mask``; nothing where they are not known."""
    means = {}
    if (sampling := output.get("sampling_per_token_logps")) is not None:
        apart = (output["old_per_token_logps"] - sampling).abs()
        means["sampling/sampling_logp_difference/mean"] = Mean.of(apart.nan_to_num(), mask & ~apart.isnan())
    if (ratio := output.get("importance_sampling_ratio")) is not None:
        where = mask if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
        means["sampling/importance_sampling_ratio/mean"] = Mean.of(ratio.nan_to_num(), where & ~ratio.isnan())
    return means


def distinct_answers(groups: Tensor, answers: Sequence[str | None]) -> dict[str, Mean]:
    """Mean number of different answers in a group, whose completions may lie on several ranks; every rank must call it.

    Args:
        groups: (completions,) the number of each one's group, the same on all ranks.
    """
    digests = (blake2b(repr(answer).encode(), digest_size=8).digest() for answer in answers)
    keys = torch.tensor([int.from_bytes(d, signed=True) for d in digests], dtype=torch.long, device=groups.device)
    everyone, own = gather(torch.stack([groups, keys], dim=1).flatten())
    pairs = everyone.view(-1, 2).unique(dim=0)
    counted = float(own.start == 0)  # all ranks know all of it: the first one says it
    count = torch.tensor([len(pairs), len(pairs[:, 0].unique())], device=groups.device) * counted
    return {"rollout/distinct_answers": Mean(*count)}
