"""A few real rollouts before the run: what the rewards and the entropies look like at the start, and what settings follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.draw import Decoding
from rl.evaluate import evaluate
from rl.plugins.entropy_band import otsu_exact
from rl.preflight.probe import outside_training
from rl.preflight.report import Section
from rl.preflight.tasks import rewarded_columns
from rl.problems import Problems

_DEAD = 0.7  # share of groups without spread above which a run learns little
_CUT = 0.3  # share of truncated completions that deserves a word


def check_rollouts(
    cfg: DictConfig,
    section: Section,
    found: Problems,
    functions: Sequence[Callable],
    weights: Sequence[float],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> None:
    """Sample ``count`` training problems as a rollout would, a group each: rewards, spread, truncation, entropies, settings."""
    rows, group, t = found.first(count), cfg.trainer.num_generations, cfg.trainer
    decoding = Decoding(t.max_completion_length, t.temperature, t.top_p, batch_size=cfg.eval.batch_size)
    samples = evaluate(
        model,
        tokenizer,
        rows,
        found.grader,
        found.answers,
        decoding,
        samples=group,
        ks=(1,),
        greedy=False,
        seed=cfg.seed,
    ).samples
    rewards = _rewards(rows, samples, functions, weights, group, section)
    spread = rewards.std(1)
    section.fact(f"{len(rows)} problems x {group} completions at temperature {t.temperature:g}")
    section.fact(
        f"reward {rewards.mean():.3f} (standard deviation {rewards.std():.3f}, correct {samples['correct'].mean():.3f})"
    )
    dead = float((spread < 1e-8).mean())
    section.fact(
        f"groups without spread {dead:.0%}: {_share(rewards, spread, 'max')} all best, {_share(rewards, spread, 'min')} all worst"
    )
    cut = float(samples["truncated"].mean())
    section.fact(f"length {samples['tokens'].mean():.0f} tokens, truncated {cut:.0%}")
    if dead > _DEAD:
        section.advise(
            f"{dead:.0%} of the groups have no spread and give no gradient. Take other problems (data.filter.pass_rate), "
            "a larger trainer.num_generations, or a reward that grades more finely."
        )
    if cut > _CUT:
        section.advise(
            f"{cut:.0%} of the completions are truncated. Raise trainer.max_completion_length (now {t.max_completion_length})."
        )
    _entropies(section, np.concatenate([np.asarray(h, dtype=float) for h in samples["token_entropy"]]))


def _rewards(rows, samples, functions, weights, group: int, section: Section) -> np.ndarray:
    """(problems, group) weighted rewards; one that needs what only a trainer has is left out."""
    columns = rewarded_columns([rows[i] for i in samples["problem"]])
    columns |= outside_training(samples["tokens"].tolist())
    prompts = [rows[i]["prompt"] for i in samples["problem"]]
    texts = samples["completion"].tolist()
    completions = texts if isinstance(prompts[0], str) else [[{"role": "assistant", "content": text}] for text in texts]
    total = np.zeros(len(texts))
    for function, weight in zip(functions, weights, strict=True):
        if getattr(function, "needs_logp", False):
            section.fact(
                f"reward.{function.__name__} is left out here: it needs the probabilities of a training rollout"
            )
            continue
        total += weight * np.asarray(function(prompts, completions, **columns))
    return total.reshape(len(rows), group)


def _share(rewards: np.ndarray, spread: np.ndarray, which: str) -> str:
    best = rewards.max() if which == "max" else rewards.min()
    return f"{((spread < 1e-8) & (np.abs(rewards.mean(1) - best) < 1e-8)).mean():.0%}"


def _entropies(section: Section, h: np.ndarray) -> None:
    p50, p80, p95 = np.quantile(h, [0.5, 0.8, 0.95])
    section.fact(
        f"entropy: mean {h.mean():.3f}, p50 {p50:.3f}, p80 {p80:.3f}, p95 {p95:.3f} nats over {len(h):,} tokens"
    )
    values = torch.from_numpy(h)[None]
    forking = values[values >= otsu_exact(torch.ones_like(values, dtype=torch.bool), values)]
    share, middle = forking.numel() / len(h), float(forking.median())
    low = max(0.0, middle - 1.4826 * _deviation(forking))
    section.fact(
        f"suggested: plugin.fork_mask.rho={share:.2f} (the tokens above {forking.min():.2f} nats, where Otsu's split falls; 0.2 keeps "
        f"those above {p80:.2f})"
    )
    section.fact(
        f"suggested: entropy_band's edges would start at {low:.2f} and {middle:.2f} nats (v2: median - MAD to median of these)"
    )
    section.fact(
        f"suggested: trainer.entropy_target={0.5 * h.mean():.2f} for trainer.use_adaptive_entropy=true, half of where it starts; "
        "TRL's 0.2 takes no account of the model"
    )


def _deviation(values: Tensor) -> float:
    return float((values - values.median()).abs().median())
