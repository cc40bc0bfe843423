"""``entrl passport``: what a model's entropy is like before any training, on the problems it would be trained for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl import build, rundir
from rl.draw import prompt_ids
from rl.dynamics import histogram_edges
from rl.errors import ConfigError
from rl.estimators import bootstrap_interval, pass_at_k
from rl.eval_run import config_for, eval_folder, evaluate_sets, limited, sample_names, with_tokenizer
from rl.paths import find_model
from rl.problems import problem_sets
from rl.quiet import quiet
from rl.recorder import Told
from rl.recording import padded
from rl.report.passport_page import card, write_passport
from rl.scoring import base_of, look
from rl.study.geometry import spectrum
from rl.study.place import page_of

_TOP_SHARES = np.arange(0, 101) / 100
RANKS = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4 to 5", 4, 5), ("6 to 10", 6, 10), ("11 to 100", 11, 100), ("above 100", 101, None))  # fmt: skip


def show_passport(target: str, overrides: Sequence[str], config_dir: str | None, out: Path | None) -> Path:
    """Sample a model on held-out problems and write its passport: a page, the numbers (.json) and a block for a model card (.md).

    Samples are those of ``entrl eval`` with the same settings, and are shared with it.

    Returns:
        The page: ``out``, or ``passport.html`` in a run folder, or ``passport_<model>.html``.

    Raises:
        ConfigError: several sets, or a setting that does not work. ReportError: no place for the page.
    """
    quiet()
    cfg = config_for(target, list(overrides), config_dir)
    _check(cfg)
    page = page_of(target, "passport", out)
    build.use_threads(cfg.engine.threads)
    path = find_model(target)
    tokenizer = build.tokenizer(with_tokenizer(path), cfg.model)
    sets = limited(problem_sets(cfg, tokenizer), cfg.passport.problems)
    if len(sets) > 1:
        raise ConfigError(
            f"A passport is of one set, and these are {len(sets)}: {', '.join(sets)}. Name one: --data {next(iter(sets))}."
        )
    (name, problems), names = next(iter(sets.items())), sample_names(sets, cfg)
    model = build.language_model(path, cfg.model)
    samples = evaluate_sets(cfg, sets, eval_folder(target, cfg), names, model, tokenizer, path)[name].samples
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in problems.heldout]
    ranks = sampled_ranks(model, prompts, samples, cfg.eval.temperature, cfg.eval.batch_size, tokenizer.pad_token_id)
    states = prompt_states(model, prompts, cfg.eval.batch_size, tokenizer.pad_token_id)
    found = passport(samples, ranks, states, tokenizer, cfg.passport.tokens, cfg.passport.min_count)
    found |= {"model": target, "data": name, "temperature": cfg.eval.temperature, "parameters": model.num_parameters()}
    write_passport(page, found)
    rundir.write_json(page.with_suffix(".json"), found)
    rundir.write_text(page.with_suffix(".md"), card(found))
    print(card(found))
    return page


def _check(cfg: DictConfig) -> None:
    for key in ("passport.problems", "passport.tokens", "passport.min_count", "eval.samples"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key}={value} does not work. Expected a whole number of at least 1.")
    cfg.eval.ks = [1]  # a passport has every k
    if cfg.eval.engine != "native":
        raise ConfigError(
            f"entrl passport samples by itself, and eval.engine={cfg.eval.engine} is another program. Leave it at native."
        )
    if cfg.eval.temperature == 0:
        raise ConfigError("eval.temperature=0 is greedy, and a passport is of samples. Raise eval.temperature.")
    build.decoding(cfg)


def passport(
    samples: pd.DataFrame,
    ranks: Sequence[np.ndarray],
    states: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    min_count: int,
) -> dict[str, Any]:
    """The numbers of a passport, as JSON.

    Args:
        samples: of :func:`rl.evaluate.evaluate`. ranks: of each sample's tokens. states: (problems, D) last hidden states of the prompts.
        tokens, min_count: rows of the forking vocabulary, and how often a word must have been sampled to be in it.
    """
    entropy = np.concatenate([np.asarray(h, dtype=float) for h in samples["token_entropy"]])
    ids = np.concatenate([np.asarray(i) for i in samples["token_ids"]])
    rank = np.concatenate(list(ranks))
    grades = [g["correct"].to_numpy(dtype=bool) for _, g in samples.groupby("problem", sort=True)]
    found, edges = spectrum(states), histogram_edges()
    return {
        "problems": len(grades),
        "samples": len(grades[0]),
        "tokens": len(entropy),
        "entropy": {
            "mean": float(entropy.mean()),
            **{f"p{q}": float(np.quantile(entropy, q / 100)) for q in (5, 50, 80, 95)},
            "histogram": {"edges": edges, "counts": np.histogram(entropy, edges)[0].tolist()},
            "share_of_top": held_by_top(entropy).tolist(),
        },
        "ranks": {name: float(((rank >= low) & (rank <= (high or rank.max()))).mean()) for name, low, high in RANKS},
        "forking": forking_vocabulary(ids, entropy, tokenizer, tokens, min_count),
        "pass_at_k": pass_curve(grades),
        "len": float(samples["tokens"].mean()),
        "truncated": float(samples["truncated"].mean()),
        "geometry": {
            "states": len(states),
            "dimensions": int(states.shape[1]),
            "rankme": None if np.isnan(found.rankme) else found.rankme,
            "alpha": None if np.isnan(found.alpha) else found.alpha,
            "eigenvalues": found.eigenvalues.tolist(),
        },
    }


def held_by_top(entropy: np.ndarray) -> np.ndarray:
    """Share of all entropy that the most uncertain 0 %, 1 %, ..., 100 % of the tokens hold, (101,)."""
    total = np.concatenate([[0.0], np.sort(entropy)[::-1].cumsum()])
    return np.interp(_TOP_SHARES * len(entropy), np.arange(len(entropy) + 1), total) / max(total[-1], 1e-300)


def forking_vocabulary(
    ids: np.ndarray, entropy: np.ndarray, tokenizer: PreTrainedTokenizerBase, size: int, min_count: int
) -> list[dict[str, Any]]:
    """The words with the highest mean entropy of the places where they were sampled, which had at least ``min_count`` such places.

    Source: Beyond the 80/20 Rule (arXiv 2506.01939), figure 2.
    """
    words = pd.DataFrame({"id": ids, "entropy": entropy}).groupby("id")["entropy"].agg(["mean", "count"])
    often = words[words["count"] >= min_count].sort_values("mean", ascending=False, kind="stable").head(size)
    return [
        {"id": int(word), "token": tokenizer.decode([int(word)]), "mean": float(mean), "count": int(count)}
        for word, mean, count in zip(often.index, often["mean"], often["count"], strict=True)
    ]


def pass_curve(grades: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """pass@k for k = 1 to the number of samples, unbiased, with 95 % intervals over the problems."""
    n = len(grades[0])
    curve = []
    for k in range(1, n + 1):
        values = [pass_at_k(n, int(g.sum()), k) for g in grades]
        low, high = bootstrap_interval(values, seed=0)
        curve.append({"k": k, "value": float(np.mean(values)), "low": low, "high": high})
    return curve


def sampled_ranks(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    samples: pd.DataFrame,
    temperature: float,
    batch: int,
    pad: int,
) -> list[np.ndarray]:
    """Rank of every token of every sample among all words, 1 the most likely."""
    told = [_told(prompts[p], ids.tolist()) for p, ids in zip(samples["problem"], samples["token_ids"], strict=True)]
    order = sorted(range(len(told)), key=lambda i: len(told[i].prompt) + len(told[i].completion))
    found: list[np.ndarray] = [np.zeros(0)] * len(told)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids, attention, there = (x.to(model.device) for x in padded([told[i] for i in chosen], pad))
        ranks = look(model, ids, attention, there.shape[1], temperature, k=1).rank
        for i, rank, of_it in zip(chosen, ranks, there, strict=True):
            found[i] = rank[of_it].cpu().numpy()
    return found


def _told(prompt: list[int], completion: list[int]) -> Told:
    return Told(prompt, completion, [True] * len(completion))


@torch.no_grad()
def prompt_states(model: PreTrainedModel, prompts: Sequence[list[int]], batch: int, pad: int) -> np.ndarray:
    """(problems, D) the last hidden state at the end of each prompt, from which the completion's first token is drawn."""
    backbone, found = base_of(model).base_model, []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        ids, attention, _ = (x.to(model.device) for x in padded([_told([], prompt) for prompt in chosen], pad))
        states = backbone(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        last = torch.tensor([len(prompt) - 1 for prompt in chosen], device=states.device)
        found.append(states[torch.arange(len(chosen), device=states.device), last].float().cpu().numpy())
    return np.concatenate(found)
