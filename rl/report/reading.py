"""Run folders, read as they are: finished, killed in the middle of a line, or written by an earlier entrl."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from rl import rundir
from rl.errors import ReportError
from rl.wandb_run import read_lines


class HistogramSeries(NamedTuple):
    """Counts of values between edges over the steps: counts (steps, bins), edges (bins + 1,) in the unit of the series."""

    steps: np.ndarray
    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        metrics: one row a step (the index), one column a series; NaN where a step has no value.
        histograms: by name. state: "done", "failed", "stopped" or "open". format: of the folder, see ``rundir.FORMAT``.
        torn: lines of ``metrics.jsonl`` that a kill cut off and that are left out.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    state: str
    format: int
    metrics: pd.DataFrame
    histograms: Mapping[str, HistogramSeries]
    torn: int

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def recorded(self) -> list[int]:
        """The steps whose rollouts were recorded."""
        return _steps_of(self.folder / "rollouts")

    @cached_property
    def probed(self) -> list[int]:
        """The steps at which the probe prompts were drawn."""
        return _steps_of(self.folder / "probes")

    def rollouts(self, step: int) -> pd.DataFrame:
        """The recorded completions of a step, of all ranks; see :class:`rl.recorder.Recorder` for the columns."""
        return _read_step(self.folder / "rollouts", step)

    def probes(self, step: int) -> pd.DataFrame:
        """The probe completions of a step; see :mod:`rl.probes` for the columns."""
        return _read_step(self.folder / "probes", step)


def read_run(folder: str | Path) -> Run:
    """Read a run folder; what is missing in it is empty.

    Raises:
        ReportError: no run folder, a sweep, or one that a newer entrl wrote.
    """
    folder = Path(folder).resolve()
    if not (folder / "config.yaml").is_file():
        what = "a sweep: give one of the runs in it" if (folder / "sweep.json").is_file() else "no run folder"
        raise ReportError(f"{folder} is {what}. Expected a folder that entrl train wrote, as runs/NAME.")
    manifest = _json(folder / "manifest.json")
    version = manifest.get("format", 1)
    if version > rundir.FORMAT:
        raise ReportError(
            f"{folder} has format {version}, and this entrl reads up to {rundir.FORMAT}. Update entrl to read it."
        )
    metrics, histograms, torn = _read_metrics(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        config=_config(folder / "config.yaml"),
        summary=_json(folder / "summary.json"),
        manifest=manifest,
        state=rundir.state(folder),
        format=version,
        metrics=metrics,
        histograms=histograms,
        torn=torn,
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml and omegaconf have several
        raise ReportError(
            f"{path} is no readable yaml: {str(error).splitlines()[0]}. Restore it from the run."
        ) from error
    if not isinstance(found, dict):
        raise ReportError(f"{path} holds no settings but a {type(found).__name__}. Restore it from the run.")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = rundir.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}  # cut off by a full disk: the rest of the folder is worth a look all the same
    return found if isinstance(found, dict) else {}


def _read_metrics(path: Path) -> tuple[pd.DataFrame, dict[str, HistogramSeries], int]:
    rows: dict[int, dict[str, float]] = {}
    found: dict[str, dict[int, Mapping[str, list]]] = {}
    total = 0
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as lines:
            total = sum(1 for line in lines if line.strip())
    read = 0
    for line in read_lines(path):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            continue  # what a kill left of a line may be JSON by chance
        read += 1
        step = line["step"]
        rows[step] = {k: v for k, v in line.items() if k != "step" and (v is None or isinstance(v, int | float))}
        for name, value in line.items():
            if isinstance(value, Mapping):
                found.setdefault(name, {})[step] = value
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float).sort_index()
    frame.index.name = "step"
    return frame, {name: histogram_series(values) for name, values in found.items()}, total - read


def histogram_series(values: Mapping[int, Mapping[str, list]]) -> HistogramSeries:
    """A series of ``{"counts": ..., "edges": ...}`` by step; steps with other edges than the first are left out."""
    steps = sorted(values)
    edges = values[steps[0]]["edges"]
    same = [step for step in steps if len(values[step]["edges"]) == len(edges)]
    counts = np.array([values[step]["counts"] for step in same], dtype=np.int64)
    return HistogramSeries(np.array(same), counts, np.array(edges))


def _steps_of(folder: Path) -> list[int]:
    found = (re.fullmatch(r"step_(\d+)(\.rank\d+)?\.parquet", path.name) for path in folder.glob("step_*.parquet"))
    return sorted({int(match[1]) for match in found if match})


def _read_step(folder: Path, step: int) -> pd.DataFrame:
    parts = sorted([*folder.glob(f"step_{step:06d}.parquet"), *folder.glob(f"step_{step:06d}.rank*.parquet")])
    if not parts:
        raise ReportError(
            f"{folder} has nothing of step {step}. It has: {', '.join(map(str, _steps_of(folder))) or 'nothing'}."
        )
    return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
