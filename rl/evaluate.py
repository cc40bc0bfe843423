"""Sampling a model on held-out problems: pass@k, maj@k, greedy, and the entropy of what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.draw import Decoding, Drawn, draw, end_ids, prompt_ids
from rl.errors import ConfigError
from rl.estimators import bootstrap_interval, maj_at_k, pass_at_k
from rl.reduce import barrier, rank
from rl.samples import Store, fingerprint

_DRAWN = ["problem", "sample", "completion", "tokens", "truncated", "mean_entropy", "token_ids", "token_entropy"]

Grader = Callable[..., list[float]]
Answers = Callable[[list[str]], list[str | None]]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and every sample: problem, sample, prompt, completion, answer, correct, tokens, truncated,
    mean_entropy, token_ids and token_entropy (nats); strict_answer and strict_correct where there are strict graders."""

    metrics: dict[str, float]
    samples: pd.DataFrame


@dataclass(frozen=True)
class Kept:
    """Where samples are kept as they are drawn: ``<folder>/<name>.parquet`` and, of the greedy ones, ``<name>_greedy.parquet``.

    Attributes:
        model: what tells the model from others (:func:`rl.samples.model_fact`, dtype, ...); must be JSON.
        say: is told what a person should know about samples on disk, before any is drawn.
    """

    folder: Path
    name: str
    model: Mapping[str, Any]
    say: Callable[[str], None]

    def store(self, suffix: str, facts: Mapping[str, Any]) -> Store:
        """For the samples that ``facts`` and the model determine, made ready by the first rank."""
        store = Store(self.folder / f"{self.name}{suffix}.parquet", {"model": self.model, **facts})
        if rank() == 0 and (note := store.prepare()):
            self.say(note)
        barrier()
        return store


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    grader: Grader,
    answers: Answers,
    decoding: Decoding,
    *,
    samples: int = 8,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    seed: int = 0,
    strict_grader: Grader | None = None,
    strict_answers: Answers | None = None,
    kept: Kept | None = None,
    progress: Callable[[Drawn], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Sample every problem, grade, and summarise. The model, its mode and torch's random state are left as they were.

    Several ranks, which need ``kept``, share the sampling; the first one grades, and the others get None.

    Samples are the policy's own: generation defaults that a model brings (a repetition penalty, say) do not apply, and a
    completion ends where training ends it, at any end of text that the tokenizer or the model declares. With ``kept`` an
    interrupted evaluation goes on where it was, to the samples it would have had; finished samples are graded again only.

    Metrics, of which docs/evaluation.md tells the denominators: ``pass@k`` (unbiased), ``maj@k`` for each k above 1,
    ``avg@<samples>`` and ``greedy``, each with ``/low`` and ``/high`` (95 %, over problems);
    ``entropy/mean|p50|p80|p95|top20_mean|first_quarter|last_quarter`` (nats, over all tokens of the sampled completions, at
    the decoding temperature and before top_p and the like), ``len`` (tokens), ``truncated`` (share without end of text),
    ``distinct`` (different answers a problem), ``extracted`` (share with an answer), and ``strict/pass@1``,
    ``strict/extracted`` where there are strict functions. A sample is correct when its grade is at least 0.5.

    Raises:
        ConfigError: no problem to evaluate, or a k larger than ``samples``. Stopped: ``stop``, asked before each batch, said so.
    """
    if not len(rows):
        raise ConfigError("There is no problem to evaluate on. Expected a held-out set with at least one row.")
    check_ks(ks, samples)
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    facts = {"prompts": fingerprint(prompts), "end of text": end_ids(model, tokenizer)}

    def graded(decoding: Decoding, samples: int, suffix: str) -> pd.DataFrame | None:
        random = {"samples": samples, "seed": seed} if decoding.temperature > 0 else {}
        facts_here = {**facts, **random, **asdict(decoding), "columns": _DRAWN}
        store = kept.store(suffix, facts_here) if kept else None
        frame = store.finished() if store else None
        if frame is None:
            frame = draw(model, tokenizer, prompts, decoding, samples, seed, store, progress, stop)
        if rank() > 0:
            return None
        frame = _graded(frame[_DRAWN], rows, grader, answers, strict_grader, strict_answers)
        if store:
            store.finish(frame)
        return frame

    frame = graded(decoding, samples, "")
    once = graded(decoding.greedy(), 1, "_greedy") if greedy else None
    if frame is None:
        return None
    return Evaluation(summary(frame, once, samples, ks, seed), frame)


def check_ks(ks: Sequence[int], samples: int) -> None:
    """Raise ConfigError unless every k can be estimated from ``samples`` samples."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ConfigError(f"eval.samples={samples} does not work. Expected a whole number of at least 1.")
    if not isinstance(ks, Sequence) or isinstance(ks, str) or not all(isinstance(k, int) for k in ks):
        raise ConfigError(f"eval.ks={ks} is no list of whole numbers. Expected one, as eval.ks=[1,8].")
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise ConfigError(
            f"eval.ks={list(ks)} does not fit eval.samples={samples}. Expected numbers from 1 to eval.samples."
        )


def _graded(frame: pd.DataFrame, rows, grader, answers, strict_grader, strict_answers) -> pd.DataFrame:
    """The samples with prompt, answer and correct, all of them graded in one call."""
    columns = {name: [rows[i][name] for i in frame["problem"]] for name in rows[0] if name != "prompt"}
    prompts = [rows[i]["prompt"] for i in frame["problem"]]
    completions = frame["completion"].tolist()

    def right(grade: Grader) -> list[bool]:
        return [g >= 0.5 for g in grade(prompts=prompts, completions=completions, **columns)]

    added = {"answer": answers(completions), "correct": right(grader)}
    if strict_answers:
        added["strict_answer"] = strict_answers(completions)
    if strict_grader:
        added["strict_correct"] = right(strict_grader)
    shown = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    order = ["problem", "sample", "prompt", "completion", *added, *_DRAWN[3:]]
    return frame.assign(prompt=shown, **added)[order]


def summary(
    frame: pd.DataFrame, greedy: pd.DataFrame | None, samples: int, ks: Sequence[int], seed: int
) -> dict[str, float]:
    """The metrics of graded samples. Args: greedy: one graded sample a problem. seed: of the intervals."""
    groups = [(list(g["answer"]), [bool(c) for c in g["correct"]]) for _, g in frame.groupby("problem", sort=True)]
    per_problem: dict[str, Sequence[float]] = {}
    for k in sorted(set(ks)):
        per_problem[f"pass@{k}"] = [pass_at_k(samples, sum(correct), k) for _, correct in groups]
        if k > 1:
            per_problem[f"maj@{k}"] = [maj_at_k(a, correct, k) for a, correct in groups]
    per_problem[f"avg@{samples}"] = [float(np.mean(correct)) for _, correct in groups]
    if greedy is not None:
        per_problem["greedy"] = greedy["correct"].astype(float).tolist()
    if "strict_correct" in frame:
        per_problem["strict/pass@1"] = frame.groupby("problem", sort=True)["strict_correct"].mean().tolist()
    metrics: dict[str, float] = {}
    for name, values in per_problem.items():
        metrics[name] = float(np.mean(values))
        metrics[f"{name}/low"], metrics[f"{name}/high"] = bootstrap_interval(values, seed)
    entropies = [np.asarray(h, dtype=float) for h in frame["token_entropy"]]
    metrics |= entropy_profile(np.concatenate(entropies)) | entropy_by_quarter(entropies)
    metrics["len"] = float(frame["tokens"].mean())
    metrics["truncated"] = float(frame["truncated"].mean())
    metrics["distinct"] = float(np.mean([len({a or "" for a in answers}) for answers, _ in groups]))
    metrics["extracted"] = float(frame["answer"].notna().mean())
    if "strict_answer" in frame:
        metrics["strict/extracted"] = float(frame["strict_answer"].notna().mean())
    return metrics


def entropy_profile(entropies: np.ndarray) -> dict[str, float]:
    """Mean, quantiles and mean of the top 20 % (ceil(0.2 n) tokens), in nats."""
    top = np.sort(entropies)[-int(np.ceil(0.2 * len(entropies))) :]
    p50, p80, p95 = np.quantile(entropies, [0.5, 0.8, 0.95])
    profile = {"mean": entropies.mean(), "p50": p50, "p80": p80, "p95": p95, "top20_mean": top.mean()}
    return {f"entropy/{name}": float(value) for name, value in profile.items()}


def entropy_by_quarter(completions: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over the tokens in the first and in the last quarter (ceil(n / 4) tokens) of each completion, in nats."""
    quarters = [int(np.ceil(len(h) / 4)) for h in completions]
    first = np.concatenate([h[:n] for h, n in zip(completions, quarters, strict=True)])
    last = np.concatenate([h[len(h) - n :] for h, n in zip(completions, quarters, strict=True)])
    return {"entropy/first_quarter": float(first.mean()), "entropy/last_quarter": float(last.mean())}
