import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rl.dynamics import Histogram
from rl.errors import ConfigError
from rl.tracking import Tracker, resolve_mode
from rl.wandb_run import Record, endings, new_run_id, read_lines
from wandb_server import KEY, Server, forget, use

HIST = {"entropy/hist": Histogram([3, 1], [0.0, 0.5, 2.0])}
ROWS = [{"prompt": "p", "reward": 1.0, "tokens": ["a"]}]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    use(monkeypatch, home)
    yield home
    forget()


@pytest.fixture
def server(monkeypatch, home):
    with Server() as server:
        use(monkeypatch, home, server.url)
        yield server


def tracker(folder, mode, **kwargs):
    return Tracker(folder, project="p", entity=None, mode=mode, name="n", init_timeout=2, finish_timeout=2, **kwargs)


def log(t, first, last):
    for step in range(first, last + 1):
        t.log(step, {"loss": step / 2}, {})


def test_every_step_is_one_line_that_strict_json_reads(tmp_path):
    t = tracker(tmp_path, "disabled")
    t.log(1, {"a": 1.5, "b": math.nan}, HIST)
    t.log(2, {"a": math.inf}, {})
    lines = [
        json.loads(line, parse_constant=lambda c: pytest.fail(c))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(abs(time.time() - line.pop("time/at")) < 300 for line in lines)
    assert lines[0] == {"step": 1, "a": 1.5, "b": None, "entropy/hist": {"counts": [3, 1], "edges": [0.0, 0.5, 2.0]}}
    assert lines[1] == {"step": 2, "a": None}
    t.finish({})
    assert t.id is None and t.where is None and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_key_it_is_offline_and_says_how_to_deliver_it(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    t = tracker(folder, "auto", tags=["fork_mask"], config={"lr": 0.1, "hub_token": "hf_secret"})
    t.log(1, {"entropy/mean": 0.5}, HIST)
    t.log(2, {"entropy/mean": 0.4}, HIST)
    t.table(2, "rollouts", ROWS)
    t.finish({"eval/after/pass@1": 0.6})
    assert shlex.split(t.where) == ["entrl", "sync", str(folder)]
    recorded = next((folder / "wandb").glob("offline-run-*"))
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(recorded)],
        capture_output=True,
        text=True,
        check=False,
    )
    if read.returncode:
        pytest.skip(f"this wandb cannot read offline runs back: {read.stderr[-200:]}")
    assert "entropy/mean" in read.stdout and "rollouts/step_000002" in read.stdout
    assert "hf_secret" not in read.stdout and "fork_mask" in read.stdout


def test_mode(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline" and resolve_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled" and resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ConfigError, match="WANDB_MODE=on is not known. Expected online"):
        resolve_mode("auto")


def test_a_key_in_netrc_counts(home):
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "x" * 40 + "\n")
    (home / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"


def test_an_online_run_arrives_whole(server, tmp_path, home, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["entrl", "train", "trainer.hub_token=hf_secret", "seed=3"])
    t = tracker(
        tmp_path, "auto", group="sweep", tags=["steer"], config={"lr": 0.1, "hub_token": "hf_secret"}, run_id="abcd"
    )
    assert t.id == "abcd" and t.where == f"{server.url}/me/p/runs/abcd"
    t.log(1, {"a": 1.5, "b": math.nan}, HIST)
    t.table(1, "rollouts", ROWS)
    t.log(2, {"a": 2.5}, {})
    t.finish({"eval/pass@1": 0.5})
    run = server.runs["abcd"]
    assert run.steps == [1, 2] and run.exit_code == 0
    first = run.history[0]
    assert first["a"] == 1.5 and math.isnan(float(first["b"])) and first["train/global_step"] == 1
    assert first["entropy/hist"]["values"] == [3, 1]
    assert run.summary["eval/pass@1"] == 0.5
    assert any("rollouts/step_000001" in row for row in run.history) and any("media/table" in f for f in run.files)
    assert (run.info["displayName"], run.info["groupName"], run.info["tags"]) == ("n", "sweep", ["steer"])
    assert run.config["lr"]["value"] == 0.1 and "hub_token" not in run.config
    assert Record.load(tmp_path).delivered == 2 and t.where == f"{server.url}/me/p/runs/abcd"
    assert b"seed=3" in run.files["wandb-metadata.json"] and sys.argv[2] == "trainer.hub_token=hf_secret"
    for path in [p for folder in (tmp_path, home) for p in folder.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        assert KEY.encode() not in content and b"hf_secret" not in content, path
    assert not (home / ".netrc").exists()


def test_a_resumed_run_has_every_step_once(server, tmp_path):
    t = tracker(tmp_path, "online")
    log(t, 1, 5)
    t.finish({})
    again = tracker(tmp_path, "online")
    assert again.id == t.id
    log(again, 4, 4)  # from the checkpoint of step 3, and stopped again before anything new
    again.table(4, "rollouts", ROWS)
    again.finish({})
    assert server.runs[t.id].steps == [1, 2, 3, 4, 5]
    third = tracker(tmp_path, "online")
    log(third, 4, 8)
    third.finish({})
    assert server.runs[t.id].steps == [1, 2, 3, 4, 5, 6, 7, 8]


KILLED = """
import os, sys
from pathlib import Path
from rl.tracking import Tracker
t = Tracker(Path(sys.argv[1]), project="p", entity=None, mode="online", name="n", run_id="abcd")
for step in range(1, 6):
    t.log(step, {"loss": step / 2}, {})
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_is_completed_when_it_is_resumed(server, tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=300).returncode == -9
    before = server.runs["abcd"].steps
    assert before == [1, 2, 3, 4, 5][: len(before)] and len(before) < 5  # the last row was open
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 6, "lo')
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    (tmp_path / "metrics.jsonl").write_text("".join(_lines(tmp_path)[:3]))  # what a resume at step 3 leaves
    t = tracker(tmp_path, "online")
    log(t, 4, 7)
    t.finish({})
    run = server.runs["abcd"]
    assert run.steps == [1, 2, 3, 4, 5, 6, 7] and [row["loss"] for row in run.history] == [s / 2 for s in range(1, 8)]


def _lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("trouble", ["hang", 500, 401, "no server", "short key"])
def test_a_start_that_fails_is_recorded_offline_under_the_same_id(server, tmp_path, monkeypatch, capsys, trouble):
    if trouble == "no server":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    elif trouble == "short key":
        monkeypatch.setenv("WANDB_API_KEY", "abc")
    else:
        server.behaviour = trouble
    run_id = new_run_id()
    t = tracker(tmp_path, "online", run_id=run_id)
    log(t, 1, 2)
    t.finish({})
    assert t.id == run_id and t.where == f"entrl sync {tmp_path}"
    out = capsys.readouterr().out
    assert out.count("W&B could not be reached, so this run is recorded offline") == 1 and len(out.splitlines()) == 1
    [recorded] = [p for p in (tmp_path / "wandb").glob("*run-*") if not p.is_symlink()]
    assert recorded.name.startswith("offline-run-") and recorded.name.endswith(run_id)
    assert not [p for p in (tmp_path / "wandb").iterdir() if not p.exists()]  # dangling links


@pytest.mark.parametrize("trouble", ["hang", 500])
def test_a_network_lost_midway_blocks_neither_the_steps_nor_the_end(server, tmp_path, trouble):
    t = tracker(tmp_path, "online")
    log(t, 1, 2)
    server.behaviour = trouble
    for step in range(3, 6):
        start = time.perf_counter()
        t.log(step, {"loss": 1.0}, {})
        t.table(step, "rollouts", ROWS)
        assert time.perf_counter() - start < 10  # wandb itself waits 19 s for a table
    start = time.perf_counter()
    t.finish({})
    assert time.perf_counter() - start < 30  # for ever without finish_timeout
    assert t.where == f"entrl sync {tmp_path}" and Record.load(tmp_path).delivered is None
    assert len(_lines(tmp_path)) == 5
    server.behaviour = "serve"
    again = tracker(tmp_path, "online")
    log(again, 6, 6)
    again.finish({})
    assert server.runs[t.id].steps == [1, 2, 3, 4, 5, 6]


def test_a_refused_upload_does_not_pass_for_a_delivery(server, tmp_path):
    server.behaviour = "lose"
    t = tracker(tmp_path, "online")
    log(t, 1, 2)
    t.finish({})
    assert server.runs[t.id].steps == [] and Record.load(tmp_path).delivered is None
    assert t.where == f"entrl sync {tmp_path}"


def test_the_end_of_the_wandb_process_is_one_warning(server, tmp_path, capsys):
    t = tracker(tmp_path, "online")
    log(t, 1, 1)
    [core] = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    os.kill(core.pid, signal.SIGTERM)  # as Slurm does to every process of a job
    core.wait(timeout=60)
    log(t, 2, 4)
    t.table(4, "rollouts", ROWS)
    t.finish({"a": 1.0}, failed=True)
    out = capsys.readouterr().out
    assert out.count("W&B could not take a step") == 1 and len(out.splitlines()) <= 3
    assert len(_lines(tmp_path)) == 4 and t.where == f"entrl sync {tmp_path}"


def test_two_runs_of_one_process_are_two(server, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    both = [tracker(tmp_path / name, "online", run_id=name * 8) for name in "ab"]
    for steps, t in enumerate(both, start=1):
        log(t, 1, steps)
    for t in both:
        t.finish({})
    assert {name: run.steps for name, run in server.runs.items()} == {"aaaaaaaa": [1], "bbbbbbbb": [1, 2]}


def test_an_exception_ends_the_run_as_failed(server, tmp_path):
    with pytest.raises(ValueError, match="boom"), tracker(tmp_path, "online") as t:
        log(t, 1, 1)
        raise ValueError("boom")
    assert server.runs[t.id].exit_code == 1 and Record.load(tmp_path).failed is True


def test_evaluations_are_points_of_the_history(server, tmp_path):
    t = tracker(tmp_path, "online")
    t.evaluated(0, {"eval/s/pass@1": 0.25, "eval/s/pass@1/low": 0.1, "eval/s/avg@8": 0.25, "eval/s/entropy/p80": 1.0})
    log(t, 1, 3)
    t.evaluated(3, {"eval/s/pass@1": 0.5})
    t.finish({"eval/s/pass@1/low": 0.2})
    run = server.runs[t.id]
    assert run.steps == [0, 1, 2, 3] and [key for key in run.history[0] if key.startswith("eval")] == ["eval/s/pass@1"]
    assert {row["_step"]: row["eval/s/pass@1"] for row in run.history if "eval/s/pass@1" in row} == {0: 0.25, 3: 0.5}
    again = tracker(tmp_path, "online")
    again.evaluated(0, {"eval/s/pass@1": 0.25})  # as the training does; the row is closed
    log(again, 4, 4)
    again.finish({})
    assert run.steps == [0, 1, 2, 3, 4]


def test_an_evaluation_that_the_training_went_back_behind_is_forgotten(tmp_path):
    t = tracker(tmp_path, "offline")
    t.evaluated(0, {"a": 1.0})
    log(t, 1, 4)
    t.evaluated(4, {"a": 2.0})
    t.finish({})
    (tmp_path / "metrics.jsonl").write_text("".join(_lines(tmp_path)[:2]))  # what a resume at step 2 leaves
    tracker(tmp_path, "offline").finish({})
    assert list(Record.load(tmp_path).evaluations) == ["0"]


def test_an_alert_reaches_the_user(server, tmp_path):
    t = tracker(tmp_path, "online")
    log(t, 1, 1)
    t.alert("entropy collapses", "0.1 nats at step 1")
    t.finish({})
    [alert] = server.alerts
    assert (alert["title"], alert["text"], alert["severity"]) == ("entropy collapses", "0.1 nats at step 1", "WARN")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_an_alert_without_a_server_is_nothing(tmp_path, mode, capsys):
    t = tracker(tmp_path, mode)
    t.alert("a", "b")
    t.finish({})
    assert capsys.readouterr().out == ""


def test_an_alert_that_fails_leaves_the_run_alone(server, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no line\nat all")

    t = tracker(tmp_path, "online")
    log(t, 1, 1)
    monkeypatch.setattr(t._run, "alert", fail)
    t.alert("a", "b")
    t.finish({})
    assert capsys.readouterr().out == "W&B could not send the alert 'a' (OSError: no line).\n"
    assert Record.load(tmp_path).delivered == 1


def test_what_runs_are_sorted_by(tmp_path):
    t = tracker(tmp_path, "disabled")
    for step in range(1, 21):
        t.log(step, {"reward/mean": step / 20, "entropy/mean": math.nan if step == 3 else (step - 10) ** 2}, {})
    t.finish({})
    assert endings(tmp_path) == {
        "last_tenth/reward/mean": 0.975,  # of steps 19 and 20, as entrl compare has it
        "last_tenth/entropy/mean": 90.5,
        "lowest/entropy/mean": 0,
    }
