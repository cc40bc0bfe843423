"""What a run folder says in words and tables: how it ended, key numbers, evaluation, alarms, time, settings. Nothing needs to be there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from rl.config import compose, differences
from rl.redact import without_secrets
from rl.report.charts import MAX_POINTS, bin_of_steps, finite
from rl.report.reading import Run
from rl.report.text import short
from rl.shadows import shadow_plugins
from rl.wandb_run import read_lines

_TOO_LONG = 1500  # characters of a reason or a value that are shown


class Tile(NamedTuple):
    """A key number: what it is, before and after (or only the one), and what it is a mean of."""

    label: str
    before: str
    after: str
    small: str


class Alarm(NamedTuple):
    """An alarm that was raised, once or several times; text: of the first."""

    name: str
    steps: Sequence[int]
    text: str


@dataclass(frozen=True)
class Measured:
    """A number of an evaluation with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.2f} to {self.high:.2f}"

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ({self.interval})" if self.interval else "")


def shown(text: object, at_most: int = _TOO_LONG) -> str:
    """Text for a page: control characters as escapes, the middle of a very long one left out."""
    return short(str(text), at_most, lines=True)


def setting(config: Any, key: str, default: Any = None) -> Any:
    """The value at ``a.b.c`` of a configuration that may have been edited by hand."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return default
        config = config[part]
    return config


def names(config: Any, group: str) -> list[str]:
    """The members of a group as ``plugin`` or ``reward``, however an editor left it."""
    value = setting(config, group) or []
    return [shown(v, 80) for v in ([value] if isinstance(value, str) else value)] if isinstance(value, Iterable) else []


def ending(run: Run) -> tuple[str, str]:
    """How the run ended, in a word and a sentence."""
    if run.state in ("failed", "stopped"):
        reason = (run.folder / run.state.upper()).read_text(encoding="utf-8", errors="replace").strip()
        return run.state, shown(reason)
    last = _number(run.metrics["time/at"].max()) if "time/at" in run.metrics and len(run.metrics) else None
    when = f"; its last step is of {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC" if last else ""
    return run.state, "" if run.state == "done" else f"it has not ended, or was killed hard{when}"


def attempts(run: Run) -> int:
    """How often it was started."""
    return sum(1 for path in run.folder.glob("logs/attempt_*") if path.is_dir())


def alarms(run: Run) -> list[Alarm]:
    """What ``alarms.jsonl`` has, an alarm a line."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in read_lines(run.folder / "alarms.jsonl"):
        if isinstance(line, Mapping) and isinstance(line.get("step"), int):
            found.setdefault(shown(line.get("alarm", "alarm"), 80), []).append(line)
    return [
        Alarm(name, [line["step"] for line in raised], shown(raised[0].get("text", "")))
        for name, raised in found.items()
    ]


def evaluations(run: Run) -> dict[str, dict[str, dict[str, Measured]]]:
    """By set, "before" or "after" and measure."""
    main = shown(setting(run.config, "data.name", "held-out"), 80)
    sets = run.summary.get("sets") or {main: run.summary.get("eval") or {}}
    return {
        shown(name, 80): {when: _measured(values) for when, values in of_set.items() if values}
        for name, of_set in sets.items()
        if isinstance(of_set, Mapping) and any(of_set.values())
    }


def _measured(values: Mapping[str, Any]) -> dict[str, Measured]:
    return {
        name: Measured(value, _number(values.get(f"{name}/low")), _number(values.get(f"{name}/high")))
        for name, raw in values.items()
        if not name.endswith(("/low", "/high")) and (value := _number(raw)) is not None
    }


def tiles(run: Run) -> list[Tile]:
    """The key numbers that the run has."""
    found = [_first_and_last(run.metrics, "reward/mean", "reward")]
    for evaluated in list(evaluations(run).values())[:1]:
        before, after = evaluated.get("before", {}), evaluated.get("after", {})
        ks = sorted(int(name[5:]) for name in {**before, **after} if name.startswith("pass@") and name[5:].isdigit())
        for name in dict.fromkeys(f"pass@{k}" for k in (*ks[:1], *ks[-1:])):
            both = [m for m in (before.get(name), after.get(name)) if m is not None]
            words = [f"{m.value:.3f}" for m in both]
            small = " → ".join(m.interval for m in both if m.interval)
            found.append(
                Tile(name, words[0] if len(words) > 1 else "", words[-1], f"95 % interval {small}" if small else "")
            )
    found.append(_first_and_last(run.metrics, "entropy/mean", "entropy"))
    found.append(_first_and_last(run.metrics, "rollout/len", "length", digits=1))
    seconds = _number(setting(run.summary, "seconds.total")) or finite(run.metrics, "time/step").sum()
    if seconds:
        small = "in all" if setting(run.summary, "seconds.total") else "in the steps"
        found.append(Tile("time", "", duration(seconds), small))
    return [tile for tile in found if tile is not None]


def _first_and_last(frame: pd.DataFrame, column: str, label: str, digits: int = 3) -> Tile | None:
    """Means over a tenth of the steps at each end, 20 at most: single steps are noise."""
    series = finite(frame, column)
    if series.empty:
        return None
    n = min(20, max(1, len(series) // 10))
    first, last = (f"{part.mean():.{digits}f}" for part in (series.iloc[:n], series.iloc[-n:]))
    if len(series) == 1:
        return Tile(label, "", first, "of the only step")
    return Tile(label, first, last, f"means of the first and last {n} steps" if n > 1 else "first and last step")


def duration(seconds: float) -> str:
    """``34 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes, hours = divmod(seconds, 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if minutes[0] < 60 else f"{hours[0]} h {hours[1]} min"


def audit(run: Run) -> list[tuple[str, str, bool]]:
    """For each plug-in its name, what it did in a sentence (a shadow: what it would do), and whether that was anything at all."""
    found, frame, shadows = [], run.metrics, shadow_plugins(run.config)
    for name in dict.fromkeys(c.split("/")[1] for c in frame if c.startswith("plugin/")):
        touched, mass = (finite(frame, f"plugin/{name}/{key}") for key in ("touched", "adv_mass"))
        if touched.empty:
            continue
        shadow = name in shadows
        said = f"{'only watched: it would touch' if shadow else 'touched'} {touched.mean():.1%} of the tokens"
        if len(mass):
            came = "of plain GRPO's advantage mass" if shadow else "of the advantage mass that came to it"
            said += f" and {'leave' if shadow else 'left'} {mass.mean():.1%} {came}"
        found.append((name, f"{said} (means over the steps).", bool(touched.max() > 0)))
    return found


def time_split(run: Run) -> list[tuple[str, float]]:
    """Seconds by what they went into; the rest is known only of a run that was never resumed."""
    step, rollout = (float(finite(run.metrics, f"time/{key}").sum()) for key in ("step", "rollout"))
    evaluation, total = (_number(setting(run.summary, f"seconds.{key}")) or 0.0 for key in ("eval", "total"))
    parts = [("rollout", rollout), ("training", max(0.0, step - rollout)), ("evaluation", evaluation)]
    if attempts(run) <= 1:
        parts.append(("rest: start, checkpoints, logging", max(0.0, total - step - evaluation)))
    return [(name, seconds) for name, seconds in parts if seconds > 0]


def changed(run: Run) -> tuple[list[tuple[str, str, str]], str]:
    """Settings that differ from this entrl's default, as (key, default, here), and a note where that is not all there is to say."""
    own = without_secrets(run.config)
    try:
        default = OmegaConf.to_container(compose())
    except Exception as error:  # of any kind: a broken file in configs/local is no reason to have no page
        return (
            [],
            f"The default configuration cannot be composed, so there is nothing to compare with: {shown(error)}",
        )
    found = differences(OmegaConf.create(own), OmegaConf.create(default))
    rows = [(shown(k, 200), _cell(a), _cell(b)) for k, (a, b) in found.items() if k not in ("run.name", "run.dir")]
    other = setting(run.manifest, "versions.entrl")
    here = _entrl()
    note = (
        f"Written by entrl {shown(other, 40)}, compared with the default of {here}." if other and other != here else ""
    )
    return rows, note


def _entrl() -> str:
    import rl

    return rl.__version__


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return shown(str(value).lower() if isinstance(value, bool) else value, 300)


def origin(run: Run) -> list[tuple[str, str]]:
    """When, from what commit, on what, with which versions: (what, value)."""
    m = run.manifest
    git, hardware = m.get("git") or {}, m.get("hardware") or {}
    gpus = setting(hardware, "gpus") or []
    on = [f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU", f"{setting(hardware, 'cpus', '?')} CPUs"]
    on += [str(v) for key in ("machine", "system") if (v := setting(hardware, key))]
    commit = setting(git, "commit")
    rows = [
        ("started", m.get("started")),
        ("commit", f"{commit}{' with uncommitted changes' if setting(git, 'dirty') else ''}" if commit else None),
        ("hardware", ", ".join(on) if hardware else None),
        ("seed", m.get("seed")),
        ("starts", attempts(run) or None),
        ("W&B run", m.get("wandb_id")),
        ("folder format", run.format),
    ]
    rows += [(name, version) for name, version in (m.get("versions") or {}).items() if version]
    return [(shown(name, 80), shown(value, 300)) for name, value in rows if value is not None]


def mean_of(frame: pd.DataFrame) -> int:
    """How many steps a point of a line is the mean of."""
    return bin_of_steps(frame.index.to_numpy(), MAX_POINTS)[1]


def command(run: Run) -> str:
    """The command line that started it, secrets masked; empty where it is not known."""
    path = run.folder / "command.sh"
    return shown(path.read_text(encoding="utf-8", errors="replace").strip()) if path.is_file() else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
