"""Whole runs that an alarm ends, and that go on only when told to; and the recorded runs that set off each alarm."""

import json
from pathlib import Path

import pytest

from command_line import entrl, metrics, train
from rl import build
from rl.callbacks.alarm import Alarms
from rl.config import compose
from rl.rundir import state
from runs import weights

RECORDED = Path(__file__).parents[1] / "recorded"
# fork_mask keeps every token, so idle_plugin goes off at step 33; the bonus moves the entropy enough for a forecast from step 30 on
LONG = [
    "trainer.max_steps=36",
    "trainer.learning_rate=1e-3",
    "trainer.entropy_coef=1.0",
    "plugin.fork_mask.rho=1.0",
    "alarm.idle_plugin.window=33",
]
OTHERS = ("entropy_slope", "entropy_floor", "dead_groups", "truncation", "length", "hollow_reward")
LONG += [*(f"alarm.{name}=null" for name in OTHERS), "eval.before=false", "record.every=0", "checkpoint.every=null"]


def alarms(folder):
    lines = [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]
    return [(line["step"], line["alarm"]) for line in lines]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_an_alarm_ends_a_run_which_goes_on_only_when_told_to(tmp_path, capsys):
    assert train(tmp_path, *LONG, name="straight") == 0
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert summary(straight)["steps"] == 36 and "stopped_by" not in summary(straight)

    assert train(tmp_path, *LONG, "alarm.idle_plugin.action=[stop]", name="stopped") == 0
    assert "ALARM idle_plugin at step 33: plugin.fork_mask has touched no token" in capsys.readouterr().out
    assert state(stopped) == "done" and summary(stopped)["steps"] == 33
    assert summary(stopped)["stopped_by"] == "idle_plugin" and "pass@1" in summary(stopped)["eval"]["after"]
    assert alarms(stopped) == alarms(straight) == [(33, "idle_plugin")]

    assert entrl("resume", str(stopped)) == 0
    assert "was ended at step 33 by its alarm idle_plugin" in capsys.readouterr().out
    assert len(metrics(stopped)) == 33

    for path in ("DONE", "summary.json"):  # as if its evaluation had been cut off
        (stopped / path).unlink()
    assert entrl("resume", str(stopped)) == 0
    assert len(metrics(stopped)) == 33 and alarms(stopped) == [(33, "idle_plugin")]
    assert state(stopped) == "done" and summary(stopped)["stopped_by"] == "idle_plugin"

    assert train(tmp_path, *LONG, "alarm.idle_plugin.action=log", "resume=auto", name="stopped") == 0
    assert summary(stopped)["steps"] == 36 and "stopped_by" not in summary(stopped)
    assert alarms(stopped) == [(33, "idle_plugin")]
    expected = metrics(straight)
    assert metrics(stopped) == expected  # the forecast, which remembers all steps, included
    assert "forecast/ceiling" in expected[35] and "forecast/ceiling" not in expected[28]
    assert all((value == weights(stopped)[name]).all() for name, value in weights(straight).items())


# Runs of the embedded task by scripts/alarm_series.py; docs/alarms.md has the commands and the reasons.
HEALTHY = {f"{name}_{seed}": [] for name in ("plain", "fork_mask") for seed in (1, 2, 3)}
SET_OFF = {
    "fast": [(22, "entropy_floor"), (22, "entropy_slope")],
    "easy": [(22, "entropy_floor"), (22, "entropy_slope")],
    "unpaid": [(20, "dead_groups")],
    "long": [(43, "length"), (45, "truncation"), (61, "dead_groups")],
    "idle": [(20, "idle_plugin")],
    "hollow": [
        (42, "length"),
        (58, "entropy_floor"),
        (62, "entropy_slope"),
        (65, "hollow_reward"),
        (67, "dead_groups"),
    ],
    "cut": [(20, "dead_groups"), (20, "truncation")],
}


@pytest.mark.parametrize("name", [*HEALTHY, *SET_OFF])
def test_recorded_runs_set_off_the_default_alarms_at_these_steps(name, tmp_path):
    recorded = json.loads((RECORDED / f"alarms_{name}.json").read_text())["series"]
    check = ["alarm.hollow_reward.check=reward/correct"] if "hollow" in name else []
    sink = Alarms(tmp_path, build.watches(compose(check)))
    for step, values in enumerate(zip(*recorded.values(), strict=True), 1):
        sink(step, dict(zip(recorded, values, strict=True)), {})
    assert (alarms(tmp_path) if sink.path.exists() else []) == (HEALTHY | SET_OFF)[name]
