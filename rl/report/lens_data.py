"""Recorded completions as a page takes them: columns of short numbers, token texts once, and as many as fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from rl.report.page import numbers, pack

# what a token can be coloured by: the columns that it takes
COLOURS = {
    "entropy": ("entropy",),
    "surprise": ("logp",),
    "rank": ("rank",),
    "kept": ("kept",),
    "weight": ("weight",),
    "shaped": ("shaped",),
    "change": ("logp_after", "old_logp"),
}
_SPECIAL = re.compile(r"<[^\s<>]+>|\[[A-Z]+\]")
_SAMPLE = 20_000  # tokens that say how large the others will be

Frames = Mapping[int, pd.DataFrame]  # by step


@dataclass(frozen=True)
class Plan:
    """How much of a view is shown: steps, prompts a step, completions of a prompt, tokens of a completion."""

    steps: int
    prompts: int
    each: int
    tokens: int


def plans(full: Plan) -> Iterator[Plan]:
    """From everything to little: first fewer prompts, then fewer steps, then fewer completions of each prompt, then their beginnings."""
    plan = full
    yield plan
    order = (("prompts", 4), ("steps", 10), ("prompts", 1), ("each", 4), ("steps", 2), ("each", 2), ("tokens", 1))
    for name, least in order:
        while (now := getattr(plan, name)) > least:
            plan = replace(plan, **{name: max(least, now * 3 // 4)})
            yield plan


def spread(items: Sequence, count: int) -> list:
    """``count`` of the items, evenly apart, the first and the last among them."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


class _Step:
    """The completions of a step by prompt, as row numbers: of rollouts the best first, of probes as they come."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame
        self.lengths = [len(tokens) for tokens in frame["tokens"]]
        self.rows: dict[str, list[int]] = {}
        for number, prompt in enumerate(frame["prompt"]):
            self.rows.setdefault(prompt, []).append(number)
        if "kind" not in frame:
            rewards = frame["reward"].fillna(-np.inf).tolist()
            for numbers_of in self.rows.values():
                numbers_of.sort(key=lambda number: -rewards[number])


def fitting(sides: Sequence[Frames], budget: int) -> tuple[Plan, Plan, list[dict[int, pd.DataFrame]], int]:
    """What there is, the most generous plan whose blocks stay below ``budget`` bytes in the page, what that keeps of each side, and
    its bytes."""
    ordered = [{step: _Step(frame) for step, frame in side.items() if len(frame)} for side in sides]
    full = _everything(ordered)
    per_token = _bytes_per_token(ordered)
    for plan in plans(full):
        chosen = _select(ordered, plan)
        parts = [(ordered[side][step], rows) for side, steps in enumerate(chosen) for step, rows in steps.items()]
        if per_token * sum(min(part.lengths[row], plan.tokens) for part, rows in parts for row in rows) > budget:
            continue
        spent = sum(size(part.frame.iloc[rows], plan.tokens) for part, rows in parts)
        if spent <= budget:
            break
    kept = [
        {step: of[step].frame.iloc[rows] for step, rows in steps.items()}
        for of, steps in zip(ordered, chosen, strict=True)
    ]
    return full, plan, kept, spent


def _everything(sides: Sequence[Mapping[int, _Step]]) -> Plan:
    """The plan that leaves nothing out."""
    steps = {step for side in sides for step in side}
    all_of = [part for side in sides for part in side.values()]
    return Plan(
        steps=len(steps),
        prompts=max((len({p for side in sides if step in side for p in side[step].rows}) for step in steps), default=0),
        each=max((len(rows) for part in all_of for rows in part.rows.values()), default=0),
        tokens=max((max(part.lengths) for part in all_of), default=0),
    )


def _select(sides: Sequence[Mapping[int, _Step]], plan: Plan) -> list[dict[int, list[int]]]:
    """The rows that a plan keeps: steps evenly apart, the prompts that all sides have first, completions from the best to the worst."""
    kept: list[dict[int, list[int]]] = [{} for _ in sides]
    for step in spread(sorted({step for side in sides for step in side}), plan.steps):
        here = [side[step].rows for side in sides if step in side]
        prompts = list(dict.fromkeys(prompt for rows in here for prompt in rows))
        prompts.sort(key=lambda prompt, here=here: -sum(prompt in rows for rows in here))
        for number, side in enumerate(sides):
            if step in side:
                rows = side[step].rows
                kept[number][step] = [i for p in prompts[: plan.prompts] for i in spread(rows.get(p, []), plan.each)]
    return kept


def _bytes_per_token(sides: Sequence[Mapping[int, _Step]]) -> float:
    parts = [part for side in sides for part in side.values()]
    if not parts:
        return 0.0
    part = parts[len(parts) // 2]
    each = max(1, _SAMPLE // len(part.lengths))
    taken = sum(min(length, each) for length in part.lengths)
    return 0.9 * size(part.frame, each) / max(1, taken)  # rather try in vain than leave out too much


def size(frame: pd.DataFrame, tokens: int) -> int:
    """Bytes of the page that a step's completions take."""
    numbers_of = {prompt: i for i, prompt in enumerate(frame["prompt"].unique())}
    return len(pack(json.dumps(block(frame, numbers_of, tokens), separators=(",", ":"))))


def block(frame: pd.DataFrame, prompt_numbers: Mapping[str, int], tokens: int) -> dict[str, Any]:
    """The completions of one step: ``rows`` of columns over at most ``tokens`` tokens, and the ``texts`` and ``ids`` they point to.

    Of a row: t, the tokens; h, entropy; lp and op, logp at the loss and at the rollout; d, how logp changed since the rollout;
    r, rank; k, kept; w, weight; s, effective advantage (w and s one number where all tokens have it); ti and tp, the most likely
    tokens and their probabilities in 1/10000, so many for each token.
    """
    known: dict[tuple[int, str], int] = {}

    def numbered(ids: Sequence[int], texts: Sequence[str]) -> list[int]:
        return [known.setdefault((int(i), text), len(known)) for i, text in zip(ids, texts, strict=True)]

    rows = []
    for row in frame.to_dict("records"):
        row = {name: value for name, value in row.items() if not _absent(value)}
        rows.append(_row(row, prompt_numbers[row["prompt"]], tokens, numbered))
    special = sorted({i for (_, text), i in known.items() if _SPECIAL.fullmatch(text) and not _written(text, frame)})
    return {"rows": rows, "ids": [i for i, _ in known], "texts": [text for _, text in known], "special": special}


def _row(row: Mapping[str, Any], prompt: int, tokens: int, numbered) -> dict[str, Any]:
    texts = row["tokens"]
    cut = slice(0, tokens)
    out: dict[str, Any] = {
        "p": prompt,
        "t": numbered(row["token_ids"][cut], texts[cut]),
        "n": len(texts),
        "kind": row.get("kind", ""),
        "reward": _one(row.get("reward")),
        "rewards": {k.removeprefix("reward/"): _one(v) for k, v in row.items() if k.startswith("reward/")},
        "advantage": _one(row.get("advantage")),
        "mean": _one(np.mean(row["entropy"])) if len(texts) else None,
    }
    for key, name in (("h", "entropy"), ("lp", "logp"), ("op", "old_logp")):
        if name in row:
            out[key] = numbers(np.round(row[name][cut], 5))
    if "rank" in row:
        out["r"] = [int(rank) for rank in row["rank"][cut]]
    if "kept" in row:
        out["k"] = [int(kept) for kept in row["kept"][cut]]
    for key, name in (("w", "weight"), ("s", "shaped")):
        if name in row:
            values = numbers(row[name][cut])
            out[key] = values[0] if len(set(values)) == 1 else values
    if "logp_after" in row and "old_logp" in row:  # here, where the difference of two rounded numbers is not yet noise
        out["d"] = numbers(np.asarray(row["logp_after"][cut]) - np.asarray(row["old_logp"][cut]), 3)
    if "top_ids" in row:
        ids, words, probs = (row[name][cut] for name in ("top_ids", "top_tokens", "top_probs"))
        out["ti"] = [i for a, b in zip(ids, words, strict=True) for i in numbered(a, b)]
        out["tp"] = [round(10_000 * float(p)) for place in probs for p in place]
    return out


def _absent(value: Any) -> bool:
    """Whether a row lacks a column that others have: frames of different ages and ranks are put together."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def _one(value: float | None) -> float | None:
    return numbers([value])[0]


def _written(text: str, frame: pd.DataFrame) -> bool:
    """Whether it stands in the completions, from which special tokens are left out: then the model wrote it letter by letter."""
    return "completion" in frame and any(text in completion for completion in frame["completion"])


def scales(sides: Sequence[Frames]) -> dict[str, float]:
    """Where each colouring is at its strongest, the same over all steps and sides: all but the 0.5 % largest values lie below."""
    frames = [frame for side in sides for frame in side.values()]

    def top(name: str, minus: str | None = None, shift: float = 0.0) -> float | None:
        parts = [np.empty(0)]
        for frame in frames:
            if name in frame and (minus is None or minus in frame):
                others = frame[minus] if minus else [shift] * len(frame)
                pairs = [(a, b) for a, b in zip(frame[name], others, strict=True) if np.ndim(a) and b is not None]
                parts += [np.abs(np.asarray(a, dtype=float) - b) for a, b in pairs]
        found = np.concatenate(parts)
        found = found[np.isfinite(found)]
        return float(f"{np.quantile(found, 0.995):.3g}") if len(found) else None

    return {
        "entropy": top("entropy") or 1.0,
        "surprise": top("logp") or 1.0,
        "rank": max(top("rank") or 0.0, 10.0),
        "weight": top("weight", shift=1.0) or 1.0,
        "shaped": top("shaped") or 1.0,
        "change": top("logp_after", minus="old_logp") or 1.0,
    }
