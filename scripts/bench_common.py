"""What the benchmarks share: a measured child process, medians, a table, a file of ratios.

Every case runs in a process of its own, one after the other, so that peak memory is that case's and no cache of another helps it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table


def arguments(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and ratios here")
    parser.add_argument("--quick", action="store_true", help="a smaller case, in under a minute")
    parser.add_argument("--repeat", type=int, default=3, help="rounds over all cases; medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    return parser


@contextmanager
def measured(into: dict):
    """CPU seconds, wall seconds and peak memory (MB above what was held at the start) of the block."""
    held = _reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    into["cpu_s"], into["wall_s"] = time.process_time() - cpu, time.perf_counter() - wall
    into["peak_mb"] = _peak_mb() - held


def _reset_peak() -> float:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
        return _status_mb("VmRSS")
    except OSError:
        return _peak_mb()


def _peak_mb() -> float:
    if Path("/proc/self/status").exists():
        return _status_mb("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no {field}")


def rounds(cases: dict[str, tuple[Callable[..., dict], tuple]], repeat: int) -> dict[str, dict]:
    """Run all cases in turn, ``repeat`` times, each in a fresh process; medians by name."""
    found: dict[str, list[dict]] = {name: [] for name in cases}
    context = multiprocessing.get_context("spawn")
    for n in range(repeat):
        for name, (function, args) in cases.items():
            print(f"\r\033[K{n + 1}/{repeat}  {name}", end="", file=sys.stderr, flush=True)
            with context.Pool(1) as pool:
                found[name].append(pool.apply(function, args))
    print("\r\033[K", end="", file=sys.stderr)
    return {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}


def report(title: str, rows: dict[str, dict], ratios: dict[str, float], path: Path | None) -> None:
    """Print a table of the rows and the ratios, and write both to ``path``."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_shown(row.get(column)) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, value in ratios.items():
        console.print(f"{name:28} {value:.3g}", highlight=False)
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        data = {"rows": [{"case": name, **row} for name, row in rows.items()], "ratios": ratios}
        partial.write_text(json.dumps(data, indent=1))
        partial.replace(path)
        console.print(f"written to {path}", highlight=False)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
