"""How far a run has come, from what lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

_TAIL = 65536  # bytes; a line of metrics.jsonl has about 4,000


class Progress(NamedTuple):
    """The newest step of a run; None where nothing is known yet."""

    step: int | None = None
    reward: float | None = None
    entropy: float | None = None


def progress(run: Path) -> Progress:
    """The last whole line of ``metrics.jsonl``."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return Progress()
    for line in reversed(lines):
        try:
            values = json.loads(line)
            return Progress(values["step"], values.get("reward/mean"), values.get("entropy/mean"))
        except (ValueError, KeyError):
            continue  # half a line: being written now, or left so by a process that was killed
    return Progress()


def summary_value(run: Path, path: str) -> float | None:
    """A number of ``summary.json`` by its keys joined by dots, as ``eval.after.pass@1``; None where it is not there."""
    try:
        value: Any = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def reason(run: Path) -> str:
    """Why a run failed or stopped, in one line."""
    for marker in ("FAILED", "STOPPED"):
        try:
            lines = (run / marker).read_text(encoding="utf-8").strip().splitlines()
        except FileNotFoundError:
            continue
        return lines[0] if lines else ""
    return ""
