"""``entrl report RUN``: one page of a run, from its folder alone; also written at the end of every training."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rl.report import facts
from rl.report.charts import Chart
from rl.report.eval_charts import pass_at_k
from rl.report.page import write_page
from rl.report.reading import Run, read_run
from rl.report.run_charts import Section, sections
from rl.shadows import shadow_plugins


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        folder: of the run, in whatever state. out: the file; None: RUN/report.html.

    Raises:
        ReportError: no run folder, one of a newer entrl, or the file cannot be written.
    """
    run = read_run(folder)
    out = Path(out) if out is not None else run.folder / "report.html"
    raised = facts.alarms(run)
    marked = sorted({step for alarm in raised for step in alarm.steps[:20]})
    evaluated = facts.evaluations(run)
    curves = [pass_at_k(name, values) for name, values in (evaluated or {"held-out problems": {}}).items()]
    found = [Section("Held-out problems", curves)]
    found = [s for s in [*found, *sections(run, marked)] if s.charts]
    charts = {chart.name: chart for section in found for chart in section.shown}
    data = {"charts": {name: chart.figure for name, chart in charts.items()}, "run": _for_the_script(run, charts)}
    context = {"run": run, "sections": found, "alarms": raised, "evaluated": evaluated, **_context(run, out)}
    return write_page(out, "run.html.j2", context, data, charts=True)


def _for_the_script(run: Run, charts: dict[str, Chart]) -> dict[str, Any]:
    steps = [int(step) for step in run.metrics.index]
    over_steps = [name for name, chart in charts.items() if chart.over_steps]
    return {"first": steps[0] if steps else 0, "last": steps[-1] if steps else 0, "over_steps": over_steps}


def _context(run: Run, out: Path) -> dict[str, Any]:
    word, reason = facts.ending(run)
    changed, note = facts.changed(run)
    split = facts.time_split(run)
    return {
        "title": facts.shown(run.name, 200),
        "state": word,
        "reason": reason,
        "setup": _setup(run),
        "tiles": facts.tiles(run),
        "audit": facts.audit(run),
        "split": [(name, facts.duration(s), s / sum(s for _, s in split)) for name, s in split],
        "changed": changed,
        "changed_note": note,
        "origin": facts.origin(run),
        "command": facts.command(run),
        "width": facts.mean_of(run.metrics),
        "links": _links(run, out),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _setup(run: Run) -> list[tuple[str, str]]:
    c = run.config
    shadows = shadow_plugins(c)
    done, planned = len(run.metrics), facts.setting(c, "trainer.max_steps")
    rows = [
        ("model", facts.setting(c, "model.path") or facts.setting(c, "model.name")),
        ("data", facts.setting(c, "data.name")),
        ("plug-ins", ", ".join(n for n in facts.names(c, "plugin") if n not in shadows) or "none: plain GRPO"),
        ("shadows", ", ".join(facts.shown(name, 80) for name in shadows)),
        ("rewards", ", ".join(facts.names(c, "reward"))),
        ("steps", f"{done} of {planned}" if planned is not None else str(done)),
    ]
    return [(name, facts.shown(value, 200)) for name, value in rows if value]


def _links(run: Run, out: Path) -> list[tuple[str, str]]:
    """Pages beside this one, as (address, what it is)."""
    pages = (
        ("lens.html", "every token of the recorded completions"),
        ("forks.html", "what single decisions are worth"),
    )
    beside = [(run.folder / name, what) for name, what in pages if (run.folder / name).is_file()]
    return [(quote(os.path.relpath(path, out.resolve().parent)), what) for path, what in beside]
