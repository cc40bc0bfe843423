"""The token lens: completions with every token coloured by what is known of it, over the training, one side or two beside each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rl.errors import ReportError
from rl.report.lens_data import COLOURS, Frames, Plan, block, fitting, scales
from rl.report.page import write_page
from rl.report.reading import Run, read_run
from rl.shadows import acting_plugins

BUDGET = 4_500_000  # bytes of blocks in the page; the rest is for the page itself
MAX_SIDES = 2
_PROBES = 0.5  # of the budget, at most, where there are rollouts as well
_PROMPT = 20_000  # characters of a prompt
_VIEWS = {
    "probes": "the same held-out prompts over the training",
    "rollouts": "completions that were trained on",
    "samples": "completions drawn now",
}


@dataclass(frozen=True)
class Side:
    """A column of the page: a run or a model.

    Attributes:
        about: one line. views: by "probes", "rollouts" or "samples" the frames of each step, with the columns of
            :class:`rl.recorder.Recorder`; columns may be missing. broken: what could not be read.
    """

    name: str
    about: str
    views: Mapping[str, Frames]
    broken: list[str] = field(default_factory=list)


def lens_of_run(folder: str | Path) -> Side:
    """What a run folder recorded of its tokens.

    Raises:
        ReportError: no run folder, one of a newer entrl, or nothing recorded in it.
    """
    run = read_run(folder)
    broken: list[str] = []
    views = {
        name: _readable(run, name, steps, broken)
        for name, steps in (("probes", run.probed), ("rollouts", run.recorded))
        if steps
    }
    views = {name: frames for name, frames in views.items() if frames}
    if not views:
        raise ReportError(_nothing(run, broken))
    return Side(run.name, _about(run), views, broken)


def _nothing(run: Run, broken: Sequence[str]) -> str:
    if broken:
        return f"{run.folder}: {broken[0]}, and nothing else was recorded. Restore it from a copy of the run."
    again = f"or look at a model it saved: entrl lens {run.folder} --prompt TEXT."
    if (run.config.get("record") or {}).get("every") == 0:
        return f"{run.folder} has no rollouts: it ran with record.every=0. Train with record.every=20, {again}"
    return f"{run.folder} has no rollouts: it ended before its first step was recorded. Go on with it: entrl resume {run.folder}, {again}"


def _readable(run: Run, view: str, steps: Sequence[int], broken: list[str]) -> dict[int, pd.DataFrame]:
    frames = {}
    for step in steps:
        try:
            frame = getattr(run, view)(step)
            frames[step] = frame.drop(columns=[c for c in frame if c == "step"])
        except (OSError, ValueError) as error:  # pyarrow's are of these
            broken.append(f"{view} of step {step} cannot be read ({str(error).splitlines()[0]})")
    return {step: frame for step, frame in frames.items() if len(frame)}


def _about(run: Run) -> str:
    config = run.config
    model, data = ((config.get(key) or {}) for key in ("model", "data"))
    words = [str(model.get("name") or model.get("path") or ""), str(data.get("name") or "")]
    words.append(" + ".join(acting_plugins(config)) or "plain GRPO")
    if (seed := run.manifest.get("seed")) is not None:
        words.append(f"seed {seed}")
    return ", ".join(word for word in words if word)


def write_lens(sides: Sequence[Side], out: Path) -> list[str]:
    """Write the page of one or two sides; returns, in words, what had to be left out of it.

    Raises:
        ReportError: the file cannot be written.
    """
    names = [view for view in _VIEWS if any(view in side.views for side in sides)]
    left_out = [f"{side.name}: {what}." for side in sides for what in side.broken]
    prompts: dict[str, int] = {}
    views, blocks, budget = [], {}, BUDGET
    for view in names:
        frames = [side.views.get(view, {}) for side in sides]
        share = _PROBES if view == "probes" and len(names) > 1 else 1.0
        full, plan, kept, spent = fitting(frames, int(budget * share))
        left_out += _left_out(view, full, plan)
        blocks |= _blocks(view, kept, plan, prompts)
        budget -= spent
        views.append(
            {
                "name": view,
                "about": _VIEWS[view],
                "steps": sorted({step for side in kept for step in side}),
                "has": [{step: _summary(frame, prompts) for step, frame in side.items()} for side in kept],
                "missing": _missing(view, kept),
                "scales": scales(kept),
            }
        )
    index = {
        "sides": [{"name": side.name, "about": side.about} for side in sides],
        "prompts": [{"text": text[:_PROMPT], "label": label} for text, label in labelled(list(prompts)).items()],
        "views": views,
    }
    context = {
        "title": "Token lens: " + " and ".join(side.name for side in sides),
        "sides": sides,
        "left_out": left_out,
    }
    write_page(out, "lens.html.j2", context, {"index": index, **blocks})
    return left_out


def _blocks(view: str, kept: Sequence[Frames], plan: Plan, prompts: dict[str, int]) -> dict[str, Any]:
    """The blocks by name, ``<view>-<side>-<step>``; new prompts are numbered."""
    made = {}
    for number, side in enumerate(kept):
        for step, frame in side.items():
            for prompt in frame["prompt"]:
                prompts.setdefault(prompt, len(prompts))
            made[f"{view}-{number}-{step}"] = block(frame, prompts, plan.tokens)
    return made


def _summary(frame: pd.DataFrame, prompts: Mapping[str, int]) -> dict[int, list]:
    """By prompt: how many completions, and the mean reward, where it is known, of those that were drawn at this step."""
    drawn = frame["reward"].where(frame["kind"] == "fresh") if "kind" in frame else frame["reward"]
    means = frame.assign(reward=drawn).groupby("prompt", sort=False)["reward"].agg(["size", "mean"])
    return {
        prompts[prompt]: [int(row["size"]), None if pd.isna(row["mean"]) else round(float(row["mean"]), 3)]
        for prompt, row in means.iterrows()
    }


def _missing(view: str, kept: Sequence[Frames]) -> dict[str, str]:
    """The colourings that no side has, and why."""
    columns = {name for side in kept for frame in side.values() for name in frame if frame[name].notna().any()}
    missing = {}
    for colour, needed in COLOURS.items():
        if set(needed) <= columns:
            continue
        if view != "rollouts":
            missing[colour] = "only what was trained on has it"
        elif colour == "rank":
            missing[colour] = "recorded by an older entrl, without a method that needs it"
        else:
            missing[colour] = "recorded by an older entrl"
    if "top_ids" not in columns:
        missing["top"] = "recorded by an older entrl"
    return missing


def _left_out(view: str, full: Plan, plan: Plan) -> list[str]:
    said = [
        (plan.steps, full.steps, "of {} steps, evenly apart"),
        (plan.prompts, full.prompts, "of {} prompts at each step"),
        (plan.each, full.each, "of {} completions of each prompt, from the best to the worst"),
        (plan.tokens, full.tokens, "of at most {} tokens of a completion, the first"),
    ]
    parts = [f"{kept} {what.format(of)}" for kept, of, what in said if kept < of]
    return [f"{view.capitalize()}, to keep the page small: {'; '.join(parts)}."] if parts else []


def labelled(prompts: Sequence[str]) -> dict[str, str]:
    """By prompt a short line for a list: without the words that all begin with."""
    same = os.path.commonprefix(list(prompts)) if len(prompts) > 1 else ""
    start = max(same.rfind(" "), same.rfind("\n")) + 1 if len(same) > 20 else 0  # not within a word
    lines = {prompt: " ".join(prompt[start:].split()) or "(empty)" for prompt in prompts}
    return {prompt: line if len(line) <= 90 else line[:89] + "…" for prompt, line in lines.items()}
