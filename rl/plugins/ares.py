"""Reward uncertain stretches by how hard a prompt is: fewer on easy prompts, more on hard ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rl.contract import Explanation, Rollout, RunFacts, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.windows import mean_ahead
from rl.reduce import Reduce

KINDS = EASY, MEDIUM, HARD = 0, 1, 2  # at least 2/3, at least 1/3, less of the prompt's completions right

# the official code's constants, for easy, medium, hard
_MARGIN = (0.15, 0.25, 0.35)  # tolerance as a share of the target, at least 1
_KAPPA = (2.0, 3.0, 4.0)  # where the penalty turns from square to linear
_TAU = (2.0, 2.5, 3.0)  # softness of the gain
_CAP = (1.0, 1.0, 1.2)  # largest score, in units of alpha
_WRONG = (0.6, 0.8, 1.0)  # share of the gain that a wrong completion gets

_EPSILON = 1e-4  # TRL's, of its own advantages
_THRESHOLD_EMA, _KL_EMA = 0.99, 0.97
_KL_DEAD, _KL_STEP, _KL_CLIP, _KL_RANGE = 0.02, 0.05, 0.2, (1e-4, 1e2)
_RELAXED, _RELAXED_FROM = 0.67, 0.5  # KL of easy wrong completions whose windows exceed the threshold by so much in sum


class Ares:
    """Add to each reward a score for its number of high-entropy windows, and anchor each kind of prompt with its own KL strength.

    A window is a token whose next ``window`` tokens have a mean entropy of at least a threshold: an average over rollouts of
    the median, over completions, of each one's 95 % quantile of window means. A prompt is easy, medium or hard by the share of
    its completions that are right; n is a completion's number of windows, n* the rounded mean over the prompts of its kind::

        d = n - n*,  m = max(1, margin n*),  cap = alpha (1, 1, 1.2),  s(x) = cap / (1 + e^(-x / tau)),
        h(x) = cap min(1, huber_kappa(x) / (m + kappa)),  x+ = max(x, 0)
        right  easy -h((d - m)+),  medium -h((|d| - m)+),  hard s(d + m) where d >= -m, else -h(-d - m) at half huber
        wrong  easy 0.6 s((d - m)+),  medium 0.8 s((d - m)+),  hard s((d - m)+)
        A = (R' - mean) / (sigma + 1e-4) over the prompt's completions, R' = R + score
        alpha of a kind <- clamp(alpha + alpha_step (mean n - n*), 0, 2), hard: n* - mean n;  once a rollout
        KL = kl_coef beta_kind sum_v p (ln p - ln p_ref), beta moved once in ``kl_every`` steps towards a KL of ``kl_target``

    Source: ARES (arXiv 2510.08457), official code; ``explain`` says what differs. As in that code n* follows n, so that alpha
    moves by what rounding leaves. Advantages that earlier plug-ins shaped, and trainer.scale_rewards, are replaced.

    Args:
        alpha: of every kind at first, 0 to 2. alpha_step: see above. window: tokens. correct_from: weighted sum of the rewards
            from which a completion is right. kl_coef: 0 needs no reference model. kl_target: nats a token. kl_every: steps.

    Raises:
        ConfigError: a value outside these.
    """

    neutral: None = None  # it replaces the advantages

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        alpha_step: float = 0.05,
        window: int = 4,
        correct_from: float = 0.5,
        kl_coef: float = 0.01,
        kl_target: float = 0.01,
        kl_every: int = 100,
    ):
        if not 0 <= alpha <= 2:
            raise ConfigError(f"plugin.ares.alpha={alpha} does not work. Expected 0 <= alpha <= 2; the code's is 0.5.")
        for key, value in {"alpha_step": alpha_step, "kl_coef": kl_coef}.items():
            if not value >= 0:
                raise ConfigError(f"plugin.ares.{key}={value} would turn its sign. Expected {key} >= 0.")
        if not kl_target > 0:
            raise ConfigError(f"plugin.ares.kl_target={kl_target} is no KL to aim at. Expected nats > 0.")
        for key, value in {"window": window, "kl_every": kl_every}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"plugin.ares.{key}={value} is no count. Expected a whole number from 1 on.")
        self.alpha_step, self.window, self.correct_from = alpha_step, window, correct_from
        self.kl_coef, self.kl_target, self.kl_every = kl_coef, kl_target, kl_every
        self.needs = frozenset({"rollout_entropy", "zero_advantage"} | ({"full_kl"} if kl_coef else set()))
        self.promises = frozenset({"alone"} | (set() if kl_coef else {"recorded"}))
        self.alpha = [float(alpha)] * 3
        self.threshold: float | None = None
        self.kl = KlControl(kl_target, kl_every)

    def at_rollout(self, rollout: Rollout) -> Mapping[str, Tensor]:
        """Kind, advantage, score and KL factor of each completion; moves the threshold and each kind's alpha."""
        n, excess = self._windows(rollout)
        rewards, counts = rollout.groups(rollout.reward), rollout.groups(n)
        right = rewards >= self.correct_from
        kind = kind_of(right)
        target = torch.zeros_like(counts)
        for k in KINDS:
            if (kind == k).any():
                mean = float(counts[kind == k].mean())
                target[kind == k] = round(mean)
                move = mean - round(mean) if k != HARD else round(mean) - mean
                self.alpha[k] = min(max(self.alpha[k] + self.alpha_step * move, 0.0), 2.0)
        alpha = rewards.new_tensor(self.alpha)[kind].unsqueeze(1).expand_as(rewards)
        kinds = kind.unsqueeze(1).expand_as(rewards)
        score = entropy_score(kinds, right, counts, target, alpha)
        total = rewards + score
        advantage = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + _EPSILON)
        relaxed = (kinds == EASY) & ~right & (rollout.groups(excess) >= _RELAXED_FROM)
        factor = torch.ones_like(rewards).masked_fill(relaxed, _RELAXED)
        found = {"advantage": advantage, "score": score, "kind": kinds, "kl_factor": factor}
        return {name: rollout.own(value) for name, value in found.items()} | {"windows": n}

    def _windows(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(N,) number of high-entropy windows of each completion, and by how many nats in sum they exceed the threshold."""
        mean, full = mean_ahead(rollout.old_entropy, rollout.mask, self.window)
        own = Reduce(full).quantile(mean, 0.95, "response").squeeze(1)
        median = float(torch.nanquantile(rollout.groups(own).flatten(), 0.5))  # NaN: no completion has a whole window
        if not math.isnan(median):
            before = median if self.threshold is None else self.threshold
            self.threshold = _THRESHOLD_EMA * before + (1 - _THRESHOLD_EMA) * median
        threshold = math.inf if self.threshold is None else self.threshold
        high = (mean >= threshold) & full
        return high.sum(1).to(rollout.reward), (mean - threshold).where(high, 0.0).sum(1).to(rollout.reward)

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        def each(name: str) -> Tensor:  # a note, for every token of its completion
            return tokens.noted[name].to(signal.advantages).unsqueeze(1).expand(tokens.mask.shape)

        signal = signal.shape(each("advantage").where(tokens.mask, signal.advantages))
        for name in ("score", "windows"):
            signal = signal.log(name, each(name), tokens.mask)
        if not self.kl_coef:
            return signal
        kind = tokens.noted["kind"].unsqueeze(1)
        self.kl.observe(tokens, kind)
        beta = signal.advantages.new_tensor(self.kl.beta)[kind] * each("kl_factor")
        signal = signal.log("beta", beta, tokens.mask)
        return signal.penalise("kl", tokens.full_kl * beta, self.kl_coef, tokens.mask)

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": list(self.alpha), "threshold": self.threshold, "kl": self.kl.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alpha, self.threshold = list(state["alpha"]), state["threshold"]
        self.kl.load_state_dict(state["kl"])

    def check(self, run: RunFacts) -> list[str]:
        if run.beta and self.kl_coef:
            return [f"its KL comes on top of TRL's, trainer.beta={run.beta:g}; set that or kl_coef to 0."]
        return []

    def explain(self) -> Explanation:
        """Score and anchor at these settings, before a rollout has moved anything."""
        lines = [
            f"W = the mean of H over the next {self.window} tokens;  τ = a running median of the completions' 95 % quantiles of W",
            "n = tokens with W >= τ;  n* = the rounded mean of n over prompts of the same kind",
            f"kind: easy, medium or hard, where 2/3, 1/3 or less of a prompt's completions have a reward >= {self.correct_from:g}",
            f"R' = R + score(n - n*, kind, right), at most α (hard 1.2 α) in size;  α = {self.alpha[EASY]:g} at first",
            f"A' = (R' - mean) / (σ + {_EPSILON:g})",
        ]
        statistics: dict[str, Scope | Literal["group"]] = {
            "quantiles of W": "response",
            "kind, mean, σ": "group",
            "τ, n*, α": "rollout",
        }
        reads = ["reward", "old_entropy"]
        if self.kl_coef:
            lines.append(
                f"kl = β Σ_v p_v (ln p_v - ln p_ref_v); β of each kind is 1 at first, {_RELAXED} of it where easy, wrong and uncertain"
            )
            statistics["KL behind β"] = "world"
            reads.append("full_kl")
        return Explanation(
            formula=lines,
            reads=reads,
            changes=["advantages"],
            statistics=statistics,
            penalties={"kl": (self.kl_coef, "all")} if self.kl_coef else {},
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        yield "the code counts only windows behind a word of a list of 174, such as wait; here every token may begin one"
        yield "its H is of the ten likeliest tokens and the rest as one; here of the whole vocabulary"
        yield "its τ counts a rollout before that moves it; here it has moved, and fills no gap where a window is cut off"
        if self.kl_coef:
            yield "it estimates the KL from the sampled token, and moves β in every 100th forward of a rank on its own"
        if self.kl_coef != 0.01:
            yield "its KL coefficient is 0.01"
        yield "its filter of prompts by accuracy is left out; its dual clip is trainer.delta=3"


class KlControl:
    """A factor of the KL for each kind of prompt, larger while its mean KL is above ``target`` nats a token.

    Of each step's mean over completions an average is kept, ``k <- 0.97 k + 0.03 KL``; in every ``every``-th step
    ``ln beta <- ln beta + 0.05 clip(e, -0.2, 0.2)`` with e the same average of ``k / target - 1``, unless that is within 0.02.
    """

    def __init__(self, target: float, every: int):
        self.target, self.every = target, every
        self.beta = [1.0] * 3
        self._mean: list[float | None] = [None] * 3
        self._error = [0.0] * 3
        self._steps = 0  # that are over
        self._step = 0  # that the sums are of
        self._sums = torch.zeros(3, 2, dtype=torch.float64)  # KL of completions, their number

    def observe(self, tokens: TokenBatch, kind: Tensor) -> None:
        """Take in a micro-batch, ``kind`` (B, 1); the factors only change between steps. Every rank must call it."""
        if tokens.step != self._step:
            self._after_step()
            self._step = tokens.step
        share = 1 / tokens.mask.sum(1, keepdim=True).clamp(min=1)  # a completion counts as one, however long
        rows = []
        for k in KINDS:
            of_kind = (share * (kind == k)).expand(tokens.mask.shape)
            rows.append(torch.stack([tokens.reduce.sum(x, "world") for x in (tokens.full_kl * of_kind, of_kind)]))
        self._sums = self._sums.to(tokens.mask.device) + torch.stack(rows)

    def _after_step(self) -> None:
        self._steps += 1
        for k, (total, count) in enumerate(self._sums.tolist()):
            if not count:
                continue
            before, now = self._mean[k], total / count
            mean = self._mean[k] = now if before is None else _KL_EMA * before + (1 - _KL_EMA) * now
            error = mean / self.target - 1
            if abs(error) < _KL_DEAD or self._steps % self.every:
                continue
            self._error[k] = _KL_EMA * self._error[k] + (1 - _KL_EMA) * error
            move = _KL_STEP * min(max(self._error[k], -_KL_CLIP), _KL_CLIP)
            low, high = _KL_RANGE
            self.beta[k] = min(max(self.beta[k] * math.exp(move), low), high)
        self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Any]:
        names = ("beta", "_mean", "_error", "_steps", "_step", "_sums")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, copy.deepcopy(state[name]))


def kind_of(right: Tensor) -> Tensor:
    """(P,) EASY, MEDIUM or HARD, of (P, G) whether each completion is right."""
    found = 3 * right.sum(1)  # in whole numbers: 2/3 has none as a float
    size = right.shape[1]
    return torch.where(found >= 2 * size, EASY, torch.where(found >= size, MEDIUM, HARD))


def entropy_score(kind: Tensor, right: Tensor, n: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """What is added to the reward; all of one shape, ``kind`` of KINDS, ``right`` bool."""

    def of_kind(values: tuple[float, ...]) -> Tensor:
        return n.new_tensor(values)[kind]

    delta, kappa, cap = n - target, of_kind(_KAPPA), alpha * of_kind(_CAP)
    margin = (of_kind(_MARGIN) * target.clamp(min=1)).clamp(min=1)

    def loss(x: Tensor, scale: float = 1.0) -> Tensor:
        x = x.clamp(min=0)
        huber = torch.where(x <= kappa, x * x / (2 * kappa), x - kappa / 2)
        return -cap * (scale * huber / (margin + kappa)).clamp(max=1)

    def gain(x: Tensor) -> Tensor:
        return cap * torch.sigmoid(x / of_kind(_TAU))

    hard = torch.where(delta >= -margin, gain(delta + margin), loss(-delta - margin, 0.5))
    others = loss(torch.where(kind == MEDIUM, delta.abs(), delta) - margin)
    when_wrong = of_kind(_WRONG) * gain((delta - margin).clamp(min=0))
    return torch.where(right, torch.where(kind == HARD, hard, others), when_wrong)
