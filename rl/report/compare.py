"""``entrl compare``: methods in a table, and as a page, a CSV or a JSON file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.errors import ReportError
from rl.report.compare_terminal import show
from rl.report.compared import Comparison, compare
from rl.report.gather import gather
from rl.report.page import check_place, without_nan
from rl.rundir import write_text


def show_comparison(targets: Sequence[str], files: Mapping[str, Path], wandb: bool) -> None:
    """Compare the runs that ``targets`` name: print it, write it to ``files`` ("html", "csv", "json"), show it in W&B.

    Raises:
        ReportError: nothing to compare, or a file that cannot be written; then no file is.
    """
    _check(files)
    runs, notes = gather(targets)
    comparison = compare(runs, notes)
    if "html" in files:  # first: the one that may be too large
        from rl.report.compare_page import write_comparison

        write_comparison(comparison, files["html"])
    for kind, text in (("csv", as_csv), ("json", as_json)):
        if kind in files:
            files[kind].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[kind], text(comparison))
    show(comparison)
    for path in files.values():
        print(path)
    if wandb:
        from rl.report.wandb_view import publish

        groups = {result.method.label: result.method.runs for result in comparison.results}
        print(publish(runs, groups))


def as_csv(comparison: Comparison) -> str:
    """One line a run: name, method, seed, state, steps, used in the intervals; config keys that differ; measures."""
    keys = list(comparison.results[0].method.settings)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    own = ["name", "method", "seed", "state", "steps", "used"]
    measured = {name for result in comparison.results for found in result.measures.values() for name in found}
    names = [name for name in comparison.names if name in measured]
    names += sorted(measured - set(names))  # of runs that are left out of the intervals
    writer.writerow([*own, *keys, *names])
    for row in _runs(comparison):
        facts = [row[name] for name in own]
        writer.writerow(
            [*facts, *(row["config"][key] for key in keys), *(row["measures"].get(name, "") for name in names)]
        )
    return out.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything; docs/compare.md lists the keys."""
    value = {
        "format": 1,
        "runs": _runs(comparison),
        "methods": [
            {
                "letter": result.letter,
                "label": result.method.label,
                "config": dict(result.method.settings),
                "seeds": result.method.seeds,
                "runs": [run.name for run in result.method.runs],
                "used": [run.name for run in result.used],
                "measures": {name: cell._asdict() for name, cell in result.cells.items()},
                "problems": len(result.problems),
                "pass_at": dict(zip(map(str, result.ks), result.curves.mean(axis=0).tolist(), strict=True))
                if len(result.problems)
                else {},
            }
            for result in comparison.results
        ],
        "pairs": [
            {name: v._asdict() if hasattr(v, "_asdict") else v for name, v in vars(pair).items()}
            for pair in comparison.pairs
        ],
        "notes": list(comparison.notes),
    }
    return json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"


def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "name": run.name,
            "folder": str(run.folder),
            "method": result.method.label,
            "seed": run.config.get("seed"),
            "state": run.state,
            "steps": int(run.metrics.index[-1]) if len(run.metrics) else 0,
            "used": run in result.used,
            "config": dict(result.method.settings),
            "measures": result.measures[run.folder],
        }
        for result in comparison.results
        for run in result.method.runs
    ]


def _check(files: Mapping[str, Path]) -> None:
    """Whether each file can be written, before an hour of runs is read."""
    if len({path.resolve() for path in files.values()}) < len(files):
        raise ReportError("--html, --csv and --json name the same file. Give each its own.")
    for kind, path in files.items():
        check_place(path, f"--{kind}")
