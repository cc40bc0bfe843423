"""The last lines of a run: what it reached, where everything is, what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.callbacks.progress import show_table


def show_evaluations(metrics: Mapping[str, Mapping[str, Any]], problems: Mapping[str, int]) -> None:
    """A table a set, before -> after. Args: problems: how many of each set."""
    print()
    for name, of_set in metrics.items():
        if of_set:
            title = f"{problems[name]} held-out problems of {name}"
            show_table(of_set.get("before"), of_set.get("after"), title)


def flat_metrics(summary: Mapping[str, Any], main: str) -> dict[str, float]:
    """A run's summary under the names of W&B: ``eval/<set>/...``, before the training ``eval/<set>/before/...``, ``seconds/...``."""
    rest = {f"{of}/{k}": v for of in ("seconds", "tokens_per_second") for k, v in summary.get(of, {}).items()}
    return rest | {
        f"eval/{name}/{'before/' if when == 'before' else ''}{k}": v
        for name, of_set in summary.get("sets", {main: summary["eval"]}).items()
        for when, metrics in of_set.items()
        for k, v in metrics.items()
    }


def farewell(folder: Path, where: str | None, summary: Mapping[str, Any]) -> None:
    """Say how long it took and where to look. Args: where: the W&B page, or the command that uploads the run."""
    s = summary["seconds"]
    print(f"\n{summary['steps']} steps in {s['train']:.0f} s, evaluation {s['eval']:.0f} s, {s['total']:.0f} s in all")
    print(f"run folder  {folder}  (report.html, metrics.jsonl, summary.json, rollouts/, eval/, checkpoints/final)")
    if where is not None:
        print(f"W&B         {where}")
    print(f"next        entrl lens {folder}        every token, over the training")
    print(
        "            entrl train plugin=[]        plain GRPO: watch H fall. plugin=[steer]: another method; entrl --help lists them"
    )
    print(f"            entrl compare {folder} runs/OTHER        entrl eval {folder}")
