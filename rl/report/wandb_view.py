"""One page in W&B that shows runs side by side, entropy first: what ``entrl compare ... --wandb`` makes."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl.config import leaves
from rl.errors import ReportError
from rl.report.methods import trained
from rl.report.reading import Run
from rl.report.wandb_runs import address, asking
from rl.wandb_run import plugins, set_names

if TYPE_CHECKING:
    from wandb_workspaces import workspaces

X = "train/global_step"
PLUGINS = "entrl.plugins"  # in the configuration that W&B gets, see rl.wandb_run.about
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#4b8fc9", "#6b5b95", "#555e6b")  # as in our pages
_KEYS = 3  # W&B nests a level for each key that it groups by

_MEASURES = {
    "touched": "Tokens that a plug-in touched",
    "kept": "Tokens that a plug-in kept",
    "adv_mass": "Advantage left by a plug-in, of what it got",
}

# Sections of line plots: title of the plot and its series, in W&B's order. Series that no run has are left out.
SECTIONS: dict[str, dict[str, Sequence[str]]] = {
    "Entropy": {
        "Entropy of all tokens, nats": ["entropy/mean"],
        "Entropy of the top 20 % tokens, nats": ["entropy/top20_mean"],
        "Tokens above the starting model's p80": ["entropy/above_reference_p80"],
        "Entropy change, measured: nats a step": ["entropy/measured_change"],
        "Entropy change, predicted (sign and shape only)": ["entropy/predicted_change"],
        "Entropy, p50": ["entropy/p50"],
        "Entropy, p80": ["entropy/p80"],
        "Entropy, p95": ["entropy/p95"],
        "Entropy where the advantage is positive": ["entropy/positive_advantage"],
        "Entropy where the advantage is negative": ["entropy/negative_advantage"],
        "Entropy of kept tokens": ["entropy/kept"],
        "Entropy of dropped tokens": ["entropy/dropped"],
        "Entropy, first quarter of the completion": ["entropy/position_q1"],
        "Entropy, second quarter": ["entropy/position_q2"],
        "Entropy, third quarter": ["entropy/position_q3"],
        "Entropy, last quarter": ["entropy/position_q4"],
    },
    "Reward": {
        "Reward": ["reward/mean"],
        "Spread of the reward": ["reward/std"],
        "Forecast of the reward where entropy is gone": ["forecast/ceiling", "forecast/low", "forecast/high"],
        "The run left the forecast's law": ["forecast/departed"],
    },
    "Rollouts": {
        "Completion length, tokens": ["rollout/len"],
        "Longest completion": ["rollout/len_max"],
        "Truncated completions": ["rollout/truncated"],
        "Groups without spread: they teach nothing": ["rollout/zero_std_groups"],
        "Different answers in a group": ["rollout/distinct_answers"],
        "Tokens that the loss can move": ["compute/live"],
    },
    "Policy": {
        "Clipped from above": ["policy/clip_high"],
        "Clipped from below": ["policy/clip_low"],
        "KL to the reference": ["policy/kl"],
        "Gradient norm": ["policy/grad_norm"],
        "Learning rate": ["policy/lr"],
        "Objective (near 0 on-policy, says nothing)": ["policy/loss"],
    },
    "Time": {
        "Tokens a second": ["time/tokens_per_second"],
        "Seconds a step": ["time/step"],
        "Seconds of it for the rollout": ["time/rollout"],
        "Peak memory, GiB": ["mem/peak_gib"],
        "Tokens whose logits were computed": ["compute/scored"],
    },
}


def publish(runs: Sequence[Run], groups: Mapping[str, Sequence[Run]]) -> str:
    """Make a saved view of these runs in W&B and return its address.

    The same runs with the same series and groups are the same view: a second call finds it and leaves it as it was edited since.

    Args:
        runs: all in one W&B project. groups: the runs of each method, by its label.

    Raises:
        ReportError: a run that W&B does not have, runs of several projects, no key, no answer, or wandb-workspaces is missing.
    """
    places = [address(run) for run in runs]
    with asking("show the runs") as api:
        entity, project = _project([(place.entity or api.default_entity, place.project) for place in places])
        view = view_of(runs, groups, entity, project)
        if not _is_there(view):
            view.save()
        return view.url


def view_of(
    runs: Sequence[Run], groups: Mapping[str, Sequence[Run]], entity: str, project: str
) -> workspaces.Workspace:
    """The view that :func:`publish` saves, under a name that is made of what it shows."""
    from wandb_workspaces import workspaces as ws

    plots, bars = line_plots(runs), bar_plots(runs)
    ids = {run.folder: address(run).id for run in runs}
    methods = {label: sorted(ids[run.folder] for run in of) for label, of in groups.items()}
    view = ws.Workspace(
        entity=entity,
        project=project,
        name=_title(groups),
        sections=_sections(plots, bars),
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=max(10, len(runs)), remove_legends_from_panels=False),
        runset_settings=_runset(runs, groups, ids),
    )
    shown = json.dumps([plots, bars, methods, sorted(ids.values())], sort_keys=True)
    view._internal_name = f"nw-{hashlib.sha256(shown.encode()).hexdigest()[:11]}-v"  # how W&B names saved views
    return view


def line_plots(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Section -> plot -> series, of those that any run has; what no section names comes last, a plot a series."""
    found = {name for run in runs for name in run.metrics.columns}
    functions = {f"reward/{name}" for run in runs for name in run.config.get("reward") or {}}
    rewards = {
        f"Reward of {name.removeprefix('reward/')}" if name in functions else name: [name]
        for name in sorted(found)
        if name.startswith("reward/") and name not in ("reward/mean", "reward/std")
    }
    audits: dict[str, list[str]] = {}
    for name in sorted(name for name in found if name.startswith("plugin/")):
        measure = name.split("/", 2)[2]
        audits.setdefault(_MEASURES.get(measure, measure), []).append(name)
    wanted = {
        "Entropy": SECTIONS["Entropy"],
        "Reward": {**SECTIONS["Reward"], **rewards},
        "Rollouts": SECTIONS["Rollouts"],
        "Plug-ins: what each did to the tokens": audits,
        "Policy": SECTIONS["Policy"],
        "Time": SECTIONS["Time"],
    }
    listed = {name for plots in wanted.values() for series in plots.values() for name in series}
    wanted["Everything else"] = {name: [name] for name in sorted(found - listed - {"time/at"})}
    there = {
        section: {
            title: kept for title, series in plots.items() if (kept := [name for name in series if name in found])
        }
        for section, plots in wanted.items()
    }
    return {section: plots for section, plots in there.items() if plots}


def bar_plots(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Title -> metrics of the summary: pass@k, maj@k and greedy of each set, before and after the training."""
    bars: dict[str, list[str]] = {}
    for run in runs:
        main = next(iter(set_names(run.config)), None)
        for name, of_set in (run.summary.get("sets") or {main: run.summary.get("eval", {})}).items():
            for metric in (m for when in of_set.values() for m in when if _is_bar(m)):
                known = bars.setdefault(f"{metric} of {name}, before and after", [])
                known += [key for key in (f"eval/{name}/before/{metric}", f"eval/{name}/{metric}") if key not in known]
    return bars


def _is_bar(metric: str) -> bool:
    return metric == "greedy" or metric.startswith(("pass@", "maj@")) and "/" not in metric


def _sections(plots: Mapping[str, Mapping[str, list[str]]], bars: Mapping[str, list[str]]) -> list[workspaces.Section]:
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    def section(name: str, panels: list, columns: int = 3) -> ws.Section:
        rows = -(-len(panels) // columns)
        layout = ws.SectionLayoutSettings(columns=columns, rows=min(rows, 6))
        axis = ws.SectionPanelSettings(x_axis=X)
        is_open = name in ("Entropy", "Reward", "Evaluation")
        return ws.Section(name=name, panels=panels, is_open=is_open, layout_settings=layout, panel_settings=axis)

    lines = {
        name: section(name, [wr.LinePlot(title=title, x=X, y=series, title_x="step") for title, series in of.items()])
        for name, of in plots.items()
    }
    held_out = [wr.BarPlot(title=title, metrics=metrics, orientation="v") for title, metrics in bars.items()]
    made = list(lines.values())
    if held_out:
        made.insert(sum(name in lines for name in ("Entropy", "Reward")), section("Evaluation", held_out))
    return [*made, section("Settings that differ", [wr.RunComparer(diff_only="split")], columns=1)]


def _runset(
    runs: Sequence[Run], groups: Mapping[str, Sequence[Run]], ids: Mapping[Any, str]
) -> workspaces.RunsetSettings:
    """These runs only; a colour a method; seeds of a method drawn as one line with a band, where there are several."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    color = {label: COLORS[number % len(COLORS)] for number, label in enumerate(groups)}
    several = len(runs) > len(groups)
    keys = group_keys(groups) if several else []
    paths = {label: _path(of[0], keys) for label, of in groups.items()}
    return ws.RunsetSettings(
        filters=expr.And(expr.Metric("ID").isin(sorted(ids.values()))),
        groupby=[expr.Metric("Group") if key == "group" else expr.Config(key) for key in keys],
        order=[expr.Ordering(expr.Metric("CreatedTimestamp"), ascending=True)],
        run_settings={
            ids[run.folder]: ws.RunSettings(color=color[label]) for label, of in groups.items() for run in of
        },
        group_colors={ws.GroupPath(*path): color[label] for label, path in paths.items() if path and None not in path},
        pinned_columns=["run:displayName", "run:state", "config:entrl.value.plugins", "config:seed.value"],
    )


def group_keys(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """What W&B groups by: the sweep where there are several, the plug-ins, then settings that tell the methods apart, three at most."""
    flat = {label: [leaves(trained(run.config)) for run in of] for label, of in groups.items()}

    def tells_apart(key: str) -> bool:
        of_method = [{json.dumps(config[key]) for config in of if key in config} for of in flat.values()]
        return all(len(values) <= 1 for values in of_method) and len(set.union(*of_method)) > 1

    configs = [run.config for of in groups.values() for run in of]
    sweeps = {config.get("run", {}).get("group") for config in configs}
    keys = dict.fromkeys(key for of in flat.values() for config in of for key in config)
    settings = [key for key in keys if tells_apart(key)]
    methods = [PLUGINS] if len({plugins(config) for config in configs}) > 1 or not settings else []
    return [*(["group"] if len(sweeps) > 1 else []), *methods, *settings][:_KEYS]


def _path(run: Run, keys: Sequence[str]) -> list[str | None]:
    """What W&B files a run under: its value of each key, None where it has none."""
    known = {**leaves(run.config), PLUGINS: plugins(run.config), "group": run.config.get("run", {}).get("group")}
    values = [known.get(key) for key in keys]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _title(groups: Mapping[str, Sequence[Run]]) -> str:
    words = f"entrl: {', '.join(groups)}"[:120]
    # W&B takes no symbols in a name, the equals sign included
    return "".join(c if unicodedata.category(c)[0] in "LNPZ" else " " for c in words)


def _project(places: Sequence[tuple[str | None, str]]) -> tuple[str, str]:
    found = sorted({f"{entity}/{project}" for entity, project in places})
    if len(found) != 1:
        raise ReportError(
            f"A view of W&B shows one project, and these runs are in {', '.join(found)}. Give runs of one of them."
        )
    entity, project = places[0]
    if entity is None:
        raise ReportError(
            "W&B names no default entity for this key. Train with logger.entity=..., or set one in W&B's settings."
        )
    return entity, project


def _is_there(view: workspaces.Workspace) -> bool:
    from pydantic import ValidationError
    from wandb_workspaces import workspaces as ws

    name = view._internal_name.removeprefix("nw-").removesuffix("-v")
    try:
        ws.Workspace.from_url(f"https://wandb.ai/{view.entity}/{view.project}?nw={name}")  # the host is not looked at
    except ValidationError:  # it is, with a panel that wandb-workspaces does not know
        return True
    except ValueError as error:
        if "not found in project" in str(error):
            return False
        raise
    return True
