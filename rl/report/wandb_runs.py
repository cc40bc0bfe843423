"""Runs that only W&B has, read as if their folders were here; and what it takes to ask W&B for anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from rl.errors import EntrlError, ReportError
from rl.report.reading import Run, histogram_series
from rl.shadows import acting_plugins, shadow_plugins
from rl.wandb_run import Record, has_key, import_wandb

if TYPE_CHECKING:
    import wandb

_TIMEOUT = 20  # seconds for an answer of the server
_STATES = {"finished": "done", "failed": "failed", "crashed": "failed", "killed": "failed", "preempted": "stopped"}
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as W&B writes them in JSON


class Address(NamedTuple):
    """Where a run is in W&B; entity None: the user's default."""

    entity: str | None
    project: str
    id: str


def address(run: Run) -> Address:
    """Where W&B has a run.

    Raises:
        ReportError: it does not: W&B was off, or the run was recorded offline and never delivered.
    """
    if found := run.manifest.get("wandb"):
        return Address(**found)
    record = Record.load(run.folder)
    if record is None:
        raise ReportError(
            f"{run.folder} was made without W&B (logger.mode=disabled, or logger=none). Leave it out, or train with W&B on."
        )
    if record.delivered is None and not any((run.folder / "wandb").glob("run-*")):
        raise ReportError(f"W&B does not have {run.folder} yet. Deliver it first: entrl sync {run.folder}")
    return Address(record.entity, record.project, record.id)


def fetch(spec: str) -> list[Run]:
    """The runs of a W&B project, the oldest first, with every step of their history; those that entrl did not write are left out.

    What stays in run folders is missing: rollouts, probes, raw samples.

    Args:
        spec: ``wandb:entity/project``, or ``wandb:entity/project/group`` for a sweep of it.

    Raises:
        ReportError: another form, no key, no such project, no run of entrl's in it, or W&B does not answer.
    """
    entity, project, group = _places(spec)
    with asking(f"read {spec}") as api:
        found = list(api.runs(f"{entity}/{project}", filters={"group": group} if group else {}, lazy=False))
        ours = [run for run in found if {"trainer", "reward", "run"} <= run.config.keys()]
        if not ours:
            what = f"none of the {len(found)} runs is entrl's" if found else "there is no run"
            raise ReportError(
                f"{spec}: {what}. Give entity, project and group as they stand in the address of its page."
            )
        if len(ours) < len(found):
            print(f"{spec}: {len(ours)} of {len(found)} runs are entrl's, the others are left out")
        names = Counter(run.name for run in ours)
        return [_run(run, f"{run.name}_{run.id}" if names[run.name] > 1 else run.name) for run in ours]


@contextmanager
def asking(what: str) -> Iterator[wandb.Api]:
    """W&B's reading interface; what goes wrong inside becomes one sentence. Args: what: to do, for that sentence.

    Raises:
        ReportError: no key, no answer, or the server refuses.
    """
    if not has_key():
        raise ReportError(
            f"To {what}, W&B needs a key, and none was found in WANDB_API_KEY or ~/.netrc. Run wandb login."
        )
    try:
        wandb = import_wandb()
        wandb.setup(wandb.Settings(silent=True))  # the callers say what there is to say
        yield wandb.Api(timeout=_TIMEOUT)
    except EntrlError:
        raise
    except ImportError as error:
        raise ReportError(f"To {what}, {error.name} is needed. Run pip install {_package(error.name)}.") from error
    except Exception as error:  # of any kind: wandb is a network client with a process of its own
        reason = (str(error).splitlines() or [""])[0][:200].rstrip(".")
        raise ReportError(
            f"W&B could not {what}: {reason} ({type(error).__name__}). Look at the network, the key (wandb login --relogin) and the "
            "names, and run it again."
        ) from error


def _package(module: str | None) -> str:
    return (module or "wandb").partition(".")[0].replace("_", "-")


def _places(spec: str) -> tuple[str, str, str | None]:
    kind, _, place = spec.partition(":")
    entity, project, group = [*place.strip("/").split("/", 2), "", ""][:3]
    if kind != "wandb" or not entity or not project:
        raise ReportError(f"{spec} is no place in W&B. Expected wandb:entity/project or wandb:entity/project/group.")
    return entity, project, group or None


def _run(run: Any, name: str) -> Run:
    """Our view of a ``wandb.apis.public.Run``."""
    config = {"plugin": {}, "peft": {}, **run.config}  # W&B keeps no empty mapping
    about = config.pop("entrl", {})
    order = [name for name in about.get("plugins", "").split("+") if name in config["plugin"]]  # W&B keeps none
    config["plugin"] = {name: config["plugin"][name] for name in [*order, *sorted(config["plugin"].keys() - order)]}
    metrics, histograms = _history(run.scan_history(use_cache=False))
    steps = int(metrics.index.max()) if len(metrics) else 0
    state = _STATES.get(run.state, "open")
    ended = "seconds/total" in run.summary_metrics  # also where an alarm ended it early
    if state == "done" and steps < config["trainer"].get("max_steps", 0) and not ended:
        state = "stopped"  # by a signal, with a checkpoint: for W&B that is no failure
    return Run(
        folder=Path(f"wandb:{run.entity}/{run.project}") / name.replace("/", "_"),
        config=config,
        summary=_summary(dict(run.summary_metrics), config, about.get("sets", []), steps),
        manifest={
            "wandb": Address(run.entity, run.project, run.id)._asdict(),
            "versions": {"entrl": about.get("version")},
        },
        state=state,
        format=1,
        metrics=metrics,
        histograms=histograms,
        torn=0,
    )


def _history(rows: Iterable[Mapping[str, Any]]) -> tuple[pd.DataFrame, dict]:
    numbers: dict[int, dict[str, float]] = {}
    found: dict[str, dict[int, Mapping[str, list]]] = {}
    for row in rows:
        step = row.get("train/global_step")
        if not isinstance(step, int | float) or step < 1:  # 0: the evaluation before training
            continue
        line = numbers.setdefault(int(step), {})
        for name, value in row.items():
            value = _NUMBERS.get(value, value) if isinstance(value, str) else value
            if isinstance(value, Mapping) and value.get("_type") == "histogram" and "bins" in value:
                found.setdefault(name, {})[int(step)] = {"counts": value["values"], "edges": value["bins"]}
            elif name == "_timestamp":
                line["time/at"] = float(value)
            elif isinstance(value, int | float) and not name.startswith(("_", "eval/")) and name != "train/global_step":
                line[name] = float(value) if math.isfinite(value) else math.nan
    frame = pd.DataFrame.from_dict(numbers, orient="index", dtype=float).sort_index().sort_index(axis=1)
    frame.index.name = "step"
    return frame, {name: histogram_series(values) for name, values in found.items()}


def _summary(flat: Mapping[str, Any], config: Mapping[str, Any], order: Sequence[str], steps: int) -> dict[str, Any]:
    """The shape of ``summary.json``, from the names that :func:`rl.farewell.flat_metrics` gives its numbers."""
    sets: dict[str, dict[str, dict[str, float]]] = {}
    rest: dict[str, dict[str, float]] = {"seconds": {}, "tokens_per_second": {}}
    for key, value in flat.items():
        first, _, name = key.partition("/")
        if not isinstance(value, int | float):
            continue
        if first == "eval":
            of, _, metric = name.partition("/")
            when = "before" if metric.startswith("before/") else "after"
            sets.setdefault(of, {}).setdefault(when, {})[metric.removeprefix("before/")] = value
        elif first in rest:
            rest[first][name] = value
    sets = {name: sets[name] for name in [*order, *sets] if name in sets}  # W&B sorts by name
    return {
        "eval": next(iter(sets.values()), {}),
        **({"sets": sets} if len(sets) > 1 else {}),
        **{name: values for name, values in rest.items() if values},
        "plugins": acting_plugins(config),
        "shadows": shadow_plugins(config),
        "seed": config.get("seed"),
        "steps": steps,
    }
