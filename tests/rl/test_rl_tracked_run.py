"""A real training, offline, resumed once: what is in W&B's own file, what a server gets of it, and what comes back."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from rl.cli import main
from rl.report.reading import read_run
from rl.report.wandb_runs import fetch
from runs import SMALL
from wandb_server import Server, forget, use

SETTINGS = [
    *(word for word in SMALL if not word.startswith(("record.", "logger."))),
    "logger.mode=offline",
    "logger.project=p",
    "plugin=[fork_mask,steer]",
    "run.name=a",
    "run.group=sweep",
    "record.every=2",
    "checkpoint.every=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four steps, and two more from the checkpoint."""
    runs, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    use(patch, runs)
    for words in (["trainer.max_steps=4"], ["trainer.max_steps=6", "resume=auto"]):
        assert main(["train", *SETTINGS, f"run.dir={runs}", *words]) == 0
    forget()
    patch.undo()
    return runs / "a"


def recorded(folder):
    """The records of the newest file of a run, by wandb's own reader."""
    newest = sorted((folder / "wandb").glob("offline-run-*"))[-1]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(newest)]
    read = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in read.stdout.splitlines()]


def values(items):
    return {name: value for item in items for name, value in item.items()}


def test_what_an_offline_run_records(folder):
    records = recorded(folder)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/global_step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]  # the first attempt's too
    assert [row["train/global_step"] for row in rows] == [row["_step"] for row in rows]
    for line, row in zip(lines, rows[1:], strict=True):
        assert {k: v for k, v in line.items() if isinstance(v, float) and k != "time/at"}.items() <= row.items()
        assert row["_timestamp"] == line["time/at"]
        assert row["entropy/hist.values"] == line["entropy/hist"]["counts"]
    assert [row["_timestamp"] for row in rows] == sorted(row["_timestamp"] for row in rows)
    measured = [row["train/global_step"] for row in rows if "eval/countdown/pass@2" in row]
    assert measured == [0, 4, 6]  # before, where the first attempt ended, and after
    assert [row["train/global_step"] for row in rows if any(key.startswith("rollouts/") for key in row)] == [1, 2, 4, 6]

    series = {key for row in rows for key in row if not key.startswith(("_", "rollouts/"))}
    assert len(series) <= 58, sorted(series)  # W&B draws a chart of each; two are left to those who add some
    axes = [record["metric"] for record in records if record["type"] == "metric"]
    assert axes[1]["glob_name"] == "*" and axes[1]["step_metric"] == "train/global_step"

    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["display_name"], run["run_group"], run["tags"]) == ("a", "sweep", ["fork_mask", "steer"])
    config = run["config"]["update"]
    assert config["trainer"]["max_steps"] == 6 and config["plugin"]["fork_mask"]["rho"] == 0.2
    about, manifest = config["entrl"], json.loads((folder / "manifest.json").read_text())
    assert about["commit"] == manifest["git"]["commit"] and about["version"] == manifest["versions"]["entrl"]
    assert about["plugins"] == "fork_mask+steer" and about["sets"] == ["countdown"]

    summary = values(record["summary"]["update"] for record in records if record["type"] == "summary")
    told = json.loads((folder / "summary.json").read_text())
    for when, prefix in (("before", "before/"), ("after", "")):
        assert {f"eval/countdown/{prefix}{k}": v for k, v in told["eval"][when].items()}.items() <= summary.items()
    assert summary["seconds/total"] == told["seconds"]["total"]
    assert summary["lowest/entropy/mean"] == min(line["entropy/mean"] for line in lines)
    assert summary["last_tenth/reward/mean"] == lines[-1]["reward/mean"]


def without_empty(config):
    """W&B keeps no empty mapping."""
    return {k: without_empty(v) if isinstance(v, dict) else v for k, v in config.items() if v != {}}


def test_a_server_gets_it_all_and_gives_it_back_as_the_folder_has_it(folder, monkeypatch, tmp_path, capsys):
    with Server() as server:
        use(monkeypatch, tmp_path, server.url)
        assert main(["sync", str(folder)]) == 0
        [run] = server.runs.values()
        assert run.steps == [0, 1, 2, 3, 4, 5, 6] and "eval/countdown/pass@2" in run.history[0]
        capsys.readouterr()
        [fetched] = fetch("wandb:me/p/sweep")
        assert capsys.readouterr() == ("", "")
        forget()
    here = read_run(folder)
    pd.testing.assert_frame_equal(fetched.metrics, here.metrics, check_like=True)
    assert fetched.config["peft"] == {} and without_empty(fetched.config) == without_empty(here.config)
    assert fetched.summary == here.summary and list(fetched.config["plugin"]) == ["fork_mask", "steer"]
    assert (fetched.name, fetched.state) == ("a", "done") and not fetched.recorded
    ours, theirs = here.histograms["entropy/hist"], fetched.histograms["entropy/hist"]
    assert (ours.counts == theirs.counts).all() and (ours.edges == theirs.edges).all()
