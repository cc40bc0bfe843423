"""Sums, counts and seconds of one optimizer step, added up over micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rl.contract import Mean
from rl.reduce import all_sum


class Meter:
    """Collects what happens between two logs.

    Args:
        device: where sums over ranks are made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._means: dict[str, Mean] = {}
        self._since, self._rollout, self._tokens = time.perf_counter(), 0.0, 0.0
        self._totals = [0.0, 0.0, 0.0]  # tokens, rollout seconds, wall seconds

    def start(self) -> None:
        """The clock begins now."""
        self._since = time.perf_counter()

    def add(self, means: Mapping[str, Mean]) -> None:
        """Add to the step's means by name."""
        for name, mean in means.items():
            before = self._means.get(name)
            self._means[name] = mean if before is None else Mean(before.total + mean.total, before.count + mean.count)

    def add_rollout(self, seconds: float, tokens: float) -> None:
        """One rollout took so long and gave so many completion tokens on this rank."""
        self._rollout += seconds
        self._tokens += tokens

    def flush(self) -> dict[str, float]:
        """The step's means and times; every rank must call it. A mean of nothing is left out."""
        return self._flush_means() | self._flush_clock()

    def _flush_means(self) -> dict[str, float]:
        names = sorted(self._means)
        if not names:
            return {}
        means = [self._means[name] for name in names]
        sums = all_sum(torch.stack([torch.stack([m.total.double(), m.count.double()]) for m in means]))
        self._means = {}
        return {name: (total / count).item() for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def _flush_clock(self) -> dict[str, float]:
        now = time.perf_counter()
        wall, rollout = now - self._since, self._rollout
        tokens = all_sum(torch.tensor([self._tokens], device=self.device)).item()
        self._since, self._rollout, self._tokens = now, 0.0, 0.0
        self._totals = [total + new for total, new in zip(self._totals, (tokens, rollout, wall), strict=True)]
        times = {"time/step": wall, "time/rollout": rollout, "time/tokens_per_second": tokens / wall}
        if torch.cuda.is_available():
            times["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return times

    def tokens_per_second(self) -> dict[str, float]:
        """Completion tokens over the whole training: per second of rollout, and per second of everything."""
        tokens, rollout, wall = self._totals
        return {"rollout": tokens / max(rollout, 1e-9), "train": tokens / max(wall, 1e-9)}


def clip_shares(ratio: Tensor, advantages: Tensor, low: float, high: float, where: Tensor) -> dict[str, Mean]:
    """Shares of the tokens in ``where`` that are clipped on the side where PPO stops their gradient.

    By the advantage before the plug-ins: TRL's own series would count a masked token as not clipped, its advantage being 0.
    """
    return {
        "policy/clip_low": Mean.of(((ratio < 1 - low) & (advantages < 0)).float(), where),
        "policy/clip_high": Mean.of(((ratio > 1 + high) & (advantages > 0)).float(), where),
    }


def token_shares(
    inputs: dict, mask: Tensor, logp: Tensor, scored: Tensor, live: Tensor, bounds: tuple[float, float]
) -> dict:
    """``clip_shares`` of the scored tokens, and the shares of ``mask`` that were scored and that may get gradient; (B, T) each."""
    old_logp, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
    ratio = torch.ones_like(logp) if old_logp is None else (logp.detach() - old_logp).exp()
    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    clipped = clip_shares(ratio, advantages, *bounds, scored & mask)
    return clipped | {"compute/scored": Mean.of(scored.float(), mask), "compute/live": Mean.of(live.float(), mask)}


def distinct_answers(
    prompts: Sequence, completions: Sequence, answers: Callable[[list[str]], list[str | None]], device
) -> Mean:
    """Mean number of different answers to a prompt; completions are texts or chat messages."""
    groups: dict[str, set] = {}
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    for prompt, found in zip(prompts, answers(texts), strict=True):
        groups.setdefault(str(prompt), set()).add(found)
    return Mean(*torch.tensor([float(sum(map(len, groups.values()))), float(len(groups))], device=device))
