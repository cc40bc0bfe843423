"""Sampling a model on held-out problems: pass@k, maj@k, greedy, and the entropy of what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl.errors import ConfigError
from rl.estimators import bootstrap_interval, maj_at_k, pass_at_k
from rl.scoring import score


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and every sample: problem, sample, prompt, completion, answer, correct, tokens, truncated,
    mean_entropy and token_entropy (nats)."""

    metrics: dict[str, float]
    samples: pd.DataFrame


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 256  # completions at a time


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    grader: Callable[..., list[float]],
    answers: Callable[[list[str]], list[str | None]],
    decoding: Decoding,
    *,
    samples: int = 8,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    seed: int = 0,
) -> Evaluation:
    """Sample every problem, grade, and summarise. The model, its mode and torch's random state are left as they were.

    Samples are the policy's own: generation defaults that a model brings (a repetition penalty, say) do not apply, and a
    completion ends where training ends it, at any end of text that the tokenizer or the model declares.

    Metrics: ``pass@k`` (unbiased) and ``maj@k`` for each k, ``avg@<samples>``, ``greedy``, ``pass@k/low|high`` (95 %
    bootstrap over problems), ``entropy/mean|p50|p80|p95|top20_mean`` (nats, over all tokens of the sampled completions, at
    the decoding temperature), ``len`` (tokens), ``truncated`` (share without end of text), ``distinct`` (different answers a
    problem), ``extracted`` (share with an answer). A sample is correct when its grade is at least 0.5.

    Raises:
        ConfigError: no problem to evaluate, or a k larger than ``samples``.
    """
    if not len(rows):
        raise ConfigError("There is no problem to evaluate on. Expected a held-out set with at least one row.")
    check_ks(ks, samples)
    with _undisturbed(model, seed):
        frame = _draw(model, tokenizer, rows, decoding, samples)
        once = _draw(model, tokenizer, rows, _greedy(decoding), 1) if greedy else None
    _grade(frame, rows, grader, answers)
    metrics = _summary(frame, samples, ks, seed)
    if once is not None:
        _grade(once, rows, grader, answers)
        metrics["greedy"] = float(once["correct"].mean())
    return Evaluation(metrics, frame)


def check_ks(ks: Sequence[int], samples: int) -> None:
    """Raise ConfigError unless every k can be estimated from ``samples`` samples."""
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise ConfigError(
            f"eval.ks={list(ks)} does not fit eval.samples={samples}. Expected numbers from 1 to eval.samples."
        )


def _greedy(decoding: Decoding) -> Decoding:
    return Decoding(max_new_tokens=decoding.max_new_tokens, temperature=0.0, batch_size=decoding.batch_size)


@contextmanager
def _undisturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    training = model.training
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    defaults = base.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    # generate() fills what a given GenerationConfig leaves open from the model's own, which hub models use (transformers 5.23)
    base.generation_config = GenerationConfig(eos_token_id=defaults.eos_token_id)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        base.generation_config = defaults
        model.train(training)


def _draw(model, tokenizer, rows, decoding: Decoding, samples: int) -> pd.DataFrame:
    """One row a sample, ordered by problem; problems of similar prompt length are sampled together."""
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    per_batch, at_once = max(1, decoding.batch_size // samples), min(samples, decoding.batch_size)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    records = []
    for start in range(0, len(order), per_batch):
        chosen = [(i, prompts[i]) for i in order[start : start + per_batch]]
        for first in range(0, samples, at_once):
            numbers = range(first, min(first + at_once, samples))
            records += _draw_batch(model, tokenizer, chosen, decoding, numbers)
    return pd.DataFrame(records).sort_values(["problem", "sample"], ignore_index=True)


def _draw_batch(model, tokenizer, problems, decoding: Decoding, numbers: range) -> list[dict]:
    """``numbers`` are those of the samples to draw of each problem."""
    width = max(len(ids) for _, ids in problems)
    pad, ends = tokenizer.pad_token_id, _end_ids(model, tokenizer)
    ids = torch.full((len(problems), width), pad)
    attention = torch.zeros_like(ids)
    for row, (_, prompt) in enumerate(problems):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    ids, attention = (x.repeat_interleave(len(numbers), 0).to(model.device) for x in (ids, attention))
    sampling = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        if decoding.temperature > 0
        else {"do_sample": False}
    )
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, pad_token_id=pad, eos_token_id=ends or None, **sampling
    )
    full = model.generate(input_ids=ids, attention_mask=attention, generation_config=config)
    new = full[:, width:]
    end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    ended = end.cumsum(-1)
    valid = (ended == 0) | (end & (ended == 1))  # up to and including the first end of text
    entropy = score(
        model, full, torch.cat([attention, valid.long()], 1), new.shape[1], decoding.temperature or 1.0
    ).entropy
    texts = tokenizer.batch_decode([row[m] for row, m in zip(new, valid, strict=True)], skip_special_tokens=True)
    return [
        {
            "problem": problems[i // len(numbers)][0],
            "sample": numbers[i % len(numbers)],
            "completion": texts[i],
            "tokens": int(valid[i].sum()),
            "truncated": bool(ended[i, -1] == 0),
            "mean_entropy": float(entropy[i][valid[i]].mean()),
            "token_entropy": entropy[i][valid[i]].tolist(),
        }
        for i in range(len(new))
    ]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the tokenizer's end of text and every one the model declares, as in TRL's training."""
    declared = model.generation_config.eos_token_id
    if not isinstance(declared, list):
        declared = [declared]
    return sorted({i for i in (tokenizer.eos_token_id, *declared) if i is not None})


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt exactly as training sees it: plain text as it is, a chat through the chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def _grade(frame: pd.DataFrame, rows, grader, answers) -> None:
    """Add prompt, answer and correct to the samples, grading all of them in one call."""
    columns = {name: [rows[i][name] for i in frame["problem"]] for name in rows[0] if name != "prompt"}
    prompts = [rows[i]["prompt"] for i in frame["problem"]]
    completions = frame["completion"].tolist()
    frame.insert(2, "prompt", [p if isinstance(p, str) else p[-1]["content"] for p in prompts])
    frame["answer"] = answers(completions)
    frame["correct"] = [g >= 0.5 for g in grader(prompts=prompts, completions=completions, **columns)]


def _summary(frame: pd.DataFrame, samples: int, ks: Sequence[int], seed: int) -> dict[str, float]:
    groups = [(list(g["answer"]), list(g["correct"])) for _, g in frame.groupby("problem", sort=True)]
    metrics: dict[str, float] = {}
    for k in sorted(set(ks)):
        per_problem = [pass_at_k(samples, sum(correct), k) for _, correct in groups]
        metrics[f"pass@{k}"] = float(np.mean(per_problem))
        metrics[f"pass@{k}/low"], metrics[f"pass@{k}/high"] = bootstrap_interval(per_problem, seed)
        if k > 1:
            metrics[f"maj@{k}"] = float(np.mean([maj_at_k(a, [bool(x) for x in c], k) for a, c in groups]))
    metrics[f"avg@{samples}"] = float(frame["correct"].mean())
    metrics |= entropy_profile(np.concatenate([np.asarray(h, dtype=float) for h in frame["token_entropy"]]))
    metrics["len"] = float(frame["tokens"].mean())
    metrics["truncated"] = float(frame["truncated"].mean())
    metrics["distinct"] = float(np.mean([len({a or "" for a in answers}) for answers, _ in groups]))
    metrics["extracted"] = float(frame["answer"].notna().mean())
    return metrics


def entropy_profile(entropies: np.ndarray) -> dict[str, float]:
    """Mean, quantiles and mean of the top 20 % (ceil(0.2 n) tokens), in nats."""
    top = np.sort(entropies)[-int(np.ceil(0.2 * len(entropies))) :]
    p50, p80, p95 = np.quantile(entropies, [0.5, 0.8, 0.95])
    profile = {"mean": entropies.mean(), "p50": p50, "p80": p80, "p95": p95, "top20_mean": top.mean()}
    return {f"entropy/{name}": float(value) for name, value in profile.items()}
