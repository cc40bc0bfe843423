"""The numbers that a run comes to, and its held-out problems one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rl.report.reading import Run

_AT_K = re.compile(r"(pass|maj)@(\d+)")
TAIL = 0.1  # the last tenth of the steps
_TAILS = {
    "reward": "reward/mean",
    "entropy": "entropy/mean",
    "entropy of the top 20 %": "entropy/top20_mean",
    "length": "rollout/len",
    "truncated": "rollout/truncated",
}
ALL_SETS = "pass@1, all sets"


@dataclass(frozen=True)
class Heldout:
    """Right answers on held-out problems: ``right`` of ``n`` samples for each problem, known by its prompt in ``problems``."""

    problems: list[tuple[str, int]]
    right: np.ndarray
    n: int

    def on(self, problems: list[tuple[str, int]]) -> np.ndarray:
        """``right`` of these problems."""
        where = {problem: i for i, problem in enumerate(self.problems)}
        return self.right[[where[problem] for problem in problems]]


def measures(run: Run) -> dict[str, float]:
    """Finite numbers by name: evaluation after training, then means of the last tenth of the steps, then speed.

    ``pass@1 before``, ``pass@k``, ``maj@k``, ``greedy``; ``pass@1 of SET`` where there are several sets; ``reward``, ``entropy``,
    ``entropy of the top 20 %`` (nats), ``length`` (tokens), ``truncated``; ``tokens/s`` (median over steps), ``hours``.
    """
    before, after = (run.summary.get("eval", {}).get(when, {}) for when in ("before", "after"))
    out = {"pass@1 before": before.get("pass@1")}
    out |= {name: after[name] for name in sorted(filter(_AT_K.fullmatch, after), key=_order)}
    out["greedy"] = after.get("greedy")
    out |= {f"pass@1 of {name}": found.get("after", {}).get("pass@1") for name, found in _sets(run).items()}
    last = run.metrics.tail(math.ceil(len(run.metrics) * TAIL))
    out |= {name: last[series].mean() for name, series in _TAILS.items() if series in last}
    if "time/tokens_per_second" in run.metrics:
        out["tokens/s"] = run.metrics["time/tokens_per_second"].median()
    out["hours"] = _hours(run)
    return {name: float(value) for name, value in out.items() if value is not None and np.isfinite(value)}


def problem_interval(run: Run, measure: str) -> tuple[float, float] | None:
    """The interval over problems that the evaluation wrote for a measure, see docs/evaluation.md."""
    name, _, of = measure.partition(" of ")
    found = _sets(run)[of] if of in _sets(run) else run.summary.get("eval", {})
    name, when = (name.removesuffix(" before"), "before") if name.endswith(" before") else (name, "after")
    values = found.get(when, {})
    return (values[f"{name}/low"], values[f"{name}/high"]) if f"{name}/low" in values else None


def heldout(run: Run, when: str = "after") -> Heldout | None:
    """The samples of the evaluation before or after training, on the main set; None where they were not kept."""
    main = next(iter(_sets(run)), None)
    path = run.folder / "eval" / f"{f'{when}_{main}' if main else when}.parquet"
    try:
        frame = pd.read_parquet(path, columns=["problem", "prompt", "correct"])
    except (OSError, ValueError):  # not there, or cut off
        return None
    problems = frame.groupby("problem", sort=True)
    counts, right = problems["correct"].agg(["size", "sum"]).to_numpy().T
    if len(counts) == 0 or counts.min() != counts.max():
        return None
    prompts = problems["prompt"].first()
    return Heldout(
        problems=list(zip(prompts, prompts.groupby(prompts).cumcount(), strict=True)),  # a prompt may be there twice
        right=right.astype(int),
        n=int(counts[0]),
    )


def _sets(run: Run) -> Mapping[str, Any]:
    """Evaluations by set, the main one first; empty where there is one."""
    return run.summary.get("sets", {})


def _order(name: str) -> tuple[bool, int]:
    kind, k = _AT_K.fullmatch(name).groups()
    return kind != "pass", int(k)


def _hours(run: Run) -> float | None:
    total = run.summary.get("seconds", {}).get("total")
    if total is None and "time/step" in run.metrics:
        total = run.metrics["time/step"].sum()
    return None if total is None else total / 3600
