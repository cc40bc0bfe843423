import json
import subprocess
import sys

import pytest

from rl.cli import main
from rl.dynamics import Histogram
from rl.tracking import Tracker, last_step
from rl.wandb_run import Record
from runs import environment
from wandb_server import Server, forget, use

ROWS = [{"prompt": "p", "reward": 1.0, "tokens": ["a"]}]


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path_factory):
    with Server() as server:
        use(monkeypatch, tmp_path_factory.mktemp("home"), server.url)
        yield server
        forget()


def record(folder, first, last, mode="offline", end=True, run_id=None):
    """Log the steps as an attempt of a training does; without an end it was killed."""
    folder.mkdir(exist_ok=True)
    tracker = Tracker(folder, project="p", entity=None, mode=mode, name=folder.name, group="g", run_id=run_id)
    for step in range(first, last + 1):
        tracker.log(step, {"loss": step / 2, "bad": float("nan")}, {"h": Histogram([3, 1], [0.0, 0.5, 2.0])})
        if step % 2 == 0:
            tracker.table(step, "rollouts", ROWS)
    if end:
        tracker.finish({"eval/pass@1": 0.5})
    else:
        tracker._lines.close()
        forget()  # its process is gone, and what it had not written yet
    return tracker.id


def test_two_offline_attempts_become_one_run_with_every_step_once(server, tmp_path, capsys):
    folder = tmp_path / "a"
    run_id = record(folder, 1, 3)
    assert record(folder, 4, 6) == run_id and not server.runs
    (folder / "config.yaml").write_text("lr: 0.1\nhub_token: hf_secret\n")
    assert main(["sync", str(folder)]) == 0
    run = server.runs[run_id]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run.steps == [1, 2, 3, 4, 5, 6] and [row["loss"] for row in run.history] == [s / 2 for s in range(1, 7)]
    assert [row["_timestamp"] for row in run.history] == [line["time/at"] for line in lines]
    assert run.history[0]["h"]["values"] == [3, 1] and run.summary["eval/pass@1"] == 0.5 and run.exit_code == 0
    assert [key for row in run.history for key in row if key.startswith("rollouts/")] == [
        f"rollouts/step_{step:06d}" for step in (2, 4, 6)
    ]
    assert (run.info["displayName"], run.info["groupName"]) == ("a", "g")
    assert run.config["lr"]["value"] == 0.1 and "hub_token" not in run.config
    assert capsys.readouterr().out == f"[1/1] {folder}  6 of 6 steps sent: {server.url}/me/p/runs/{run_id}\n"

    asked = len(server.operations)
    assert main(["sync", str(folder)]) == 0
    assert len(server.operations) == asked and run.steps == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == f"[1/1] {folder}  nothing missing, W&B has all 6 steps\n"


def test_only_what_the_server_lacks_is_sent(server, tmp_path, capsys):
    folder = tmp_path / "a"
    run_id = record(folder, 1, 3, "online")
    record(folder, 4, 6)
    assert server.runs[run_id].steps == [1, 2, 3]
    assert main(["sync", str(folder)]) == 0
    assert server.runs[run_id].steps == [1, 2, 3, 4, 5, 6] and "3 of 6 steps sent" in capsys.readouterr().out


def test_a_run_that_was_killed_arrives_as_failed(server, tmp_path):
    run_id = record(tmp_path / "a", 1, 3, end=False)
    assert main(["sync", str(tmp_path / "a")]) == 0
    assert server.runs[run_id].steps == [1, 2, 3] and server.runs[run_id].exit_code == 1


@pytest.mark.parametrize(("trouble", "says"), [("lose", "did not take all of 2 steps"), (401, "failed: CommError")])
def test_a_delivery_that_fails_is_said_and_can_be_repeated(server, tmp_path, capsys, trouble, says):
    run_ids = [record(tmp_path / name, 1, 2) for name in "ab"]
    server.behaviour = trouble
    assert main(["sync", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count(says) == 2 and "Nothing is lost" in out and Record.load(tmp_path / "a").delivered is None
    server.behaviour = "serve"
    assert main(["sync", str(tmp_path)]) == 0
    assert [server.runs[run_id].steps for run_id in run_ids] == [[1, 2], [1, 2]]


def test_after_a_server_that_does_not_answer_the_rest_is_not_tried(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rl.sync.INIT_TIMEOUT", 1.0)
    for name in "abc":
        record(tmp_path / name, 1, 1)
    server.behaviour = "hang"
    assert main(["sync", str(tmp_path)]) == 1
    assert "[1/3]" in (out := capsys.readouterr().out) and "[2/3]" not in out and "2 more were not tried" in out


HOLDS = "import sys; from pathlib import Path; from rl.rundir import hold; held = hold(Path(sys.argv[1])); print(held is not None, flush=True); input()"


def test_a_run_that_is_going_on_is_left_to_itself(server, tmp_path, capsys):
    run_id = record(tmp_path / "a", 1, 2)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "a")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as other:
        assert other.stdout.readline() == "True\n"
        assert main(["sync", str(tmp_path / "a")]) == 0
        assert "is going on" in capsys.readouterr().out and run_id not in server.runs
        other.communicate("\n")
    assert main(["sync", str(tmp_path / "a")]) == 0 and run_id in server.runs


def test_a_folder_of_runs_is_searched_one_level_down_and_two(server, tmp_path, capsys):
    for path in ("one", "sweep/two"):
        (tmp_path / path).mkdir(parents=True)
        record(tmp_path / path, 1, 1, run_id=path.replace("/", "-"))
    Tracker(tmp_path / "sweep", project="p", entity=None, mode="disabled", name="n").finish({})
    assert main(["sync", str(tmp_path), str(tmp_path / "one")]) == 0
    assert sorted(server.runs) == ["one", "sweep-two"] and "[2/2]" in capsys.readouterr().out


def test_errors_of_the_user(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ([], "needs a run folder"),
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "empty")], "holds no run that W&B was on for"),
    ):
        assert main(["sync", *arguments]) == 2 and says in capsys.readouterr().err
    record(tmp_path / "a", 1, 1)
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(["sync", str(tmp_path / "a")]) == 2
    assert "Run wandb login" in capsys.readouterr().err
    assert last_step(tmp_path / "a") == 1 and last_step(tmp_path / "empty") == 0
