"""Points on this machine: how many at a time, what a failing one does to the others, signals, what is left to read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_run import fake
from rl.errors import CheckpointError, ConfigError
from rl.sweep.folder import Processes, add_job, find, read_points, read_sweep, write_sweep
from rl.sweep.local import Local, visible_gpus
from rl.sweep.points import Point
from rl.sweep.read import Progress, progress, reason, summary_value
from rl.sweep.status import cancel, standings


def make(tmp_path, *behaviours):
    folder = tmp_path / "sweep"
    folder.mkdir()
    points = [Point(n, f"{n:03d}_seed-{n}", [f"seed={n}"], {"seed": str(n)}, 1) for n in range(1, len(behaviours) + 1)]
    write_sweep(folder, points, "local", ["sweep", "seed=1,2"])
    for point in points:
        (folder / point.folder).mkdir()
    return folder, points, fake(tmp_path, *behaviours)


def run(folder, points, command, at_once=1, watch=lambda running, stopping: None, **more):
    launcher = Local(folder, at_once, command=command, **more)
    ends, late = [], time.monotonic() + 120

    def watched(running, stopping):
        assert time.monotonic() < late, "the points do not end"
        watch(running, stopping)

    launcher.run(iter(points), lambda point: None, ends.append, watched, pause=0.02)
    return launcher, {end.point.number: end.code for end in ends}


def once(number):
    """Sends a signal to a point the first time: one that is ending has no handler left, and would be killed by a second."""
    told = set()

    def send(running):
        if running.point.number not in told:
            told.add(running.point.number)
            running.process.send_signal(number)

    return send


def states(folder):
    return [s.state for s in standings(folder)]


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute for it"
        time.sleep(0.02)


def test_a_failing_point_stops_no_other(tmp_path):
    folder, points, command = make(tmp_path, "ok", "crash", "die", "ok")
    _, codes = run(folder, points, command)
    assert codes == {1: 0, 2: 1, 3: -signal.SIGKILL, 4: 0}
    assert states(folder) == ["done", "failed", "lost", "done"]
    assert [s.note for s in standings(folder)][1] == "ValueError: no such luck"
    assert not (folder / "processes.json").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_so_many_run_at_the_same_time_and_not_more(tmp_path, at_once):
    folder, points, command = make(tmp_path, *["long"] * 3)
    most, stop = [], once(signal.SIGTERM)

    def watch(running, stopping):
        most.append(len(running))
        assert len(Processes(folder).read()["points"]) == len(running)
        begun = [r for r in running if (folder / r.point.folder / "metrics.jsonl").exists()]
        if len(begun) == at_once or len(running) < at_once:
            for r in begun:
                stop(r)

    _, codes = run(folder, points, command, at_once, watch)
    assert max(most) == at_once and set(codes.values()) == {85}


def test_the_first_ctrl_c_stops_all_with_a_checkpoint_and_starts_no_more(tmp_path):
    folder, points, command = make(tmp_path, *["long"] * 3)
    sent = []

    def watch(running, stopping):
        if not sent and all((folder / r.point.folder / "metrics.jsonl").exists() for r in running):
            assert states(folder) == ["running", "running", "waiting"]
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    launcher, codes = run(folder, points, command, 2, watch)
    assert codes == {1: 85, 2: 85} and launcher.stopping and not launcher.leaving
    assert states(folder) == ["stopped", "stopped", "new"]


def test_the_second_ctrl_c_leaves_at_once(tmp_path):
    folder, points, command = make(tmp_path, "stubborn", "stubborn", "ok")
    sent = []

    def watch(running, stopping):
        if len(sent) < 2 and all((folder / r.point.folder / "metrics.jsonl").exists() for r in running):
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    launcher, codes = run(folder, points, command, 2, watch)
    assert codes == {1: 130, 2: 130} and launcher.leaving
    assert states(folder) == ["lost", "lost", "new"]


def test_a_second_term_is_patient_as_schedulers_repeat_it(tmp_path):
    folder, points, command = make(tmp_path, "long")
    sent = []

    def watch(running, stopping):
        if len(sent) < 3 and (folder / points[0].folder / "metrics.jsonl").exists():
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    launcher, codes = run(folder, points, command, 1, watch)
    assert codes == {1: 85} and not launcher.leaving


def test_points_side_by_side_get_gpus_of_their_own(tmp_path):
    folder, points, command = make(tmp_path, "long", "long", "ok")

    stop = once(signal.SIGTERM)

    def watch(running, stopping):
        if len(running) == 2 and all((folder / r.point.folder / "metrics.jsonl").exists() for r in running):
            stop(running[0])  # its place, and its GPUs, go to the third
        elif len(running) == 1 and running[0].point.number == 2:
            stop(running[0])

    run(folder, points, command, 2, watch, gpus=["3", "5", "6", "7"], gpus_per_point=2)
    assert [(folder / p.folder / "env").read_text() for p in points] == ["3,5", "6,7", "3,5"]


def test_gpus_that_the_environment_allows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, MIG-x")
    assert visible_gpus() == ["2", "MIG-x"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


LAUNCHER = """
import sys
from pathlib import Path
from rl.sweep.folder import read_points
from rl.sweep.local import Local
folder = Path(sys.argv[1])
Local(folder, 2, command=sys.argv[2:]).run(iter(read_points(folder)), print, print, lambda running, stopping: None, 0.02)
"""


@pytest.fixture
def elsewhere():
    """Starts a launcher in another process; whatever is left of it and its points ends with the test."""
    begun = []

    def start(folder, command):
        begun.append((folder, subprocess.Popen([sys.executable, "-c", LAUNCHER, str(folder), *command])))
        until(lambda: len(list(folder.glob("*/metrics.jsonl"))) == 2)
        return begun[-1][1]

    yield start
    for folder, process in begun:
        for pid in Processes(folder).points().values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def test_another_shell_sees_the_points_and_cancels_them(tmp_path, elsewhere, capsys):
    folder, points, command = make(tmp_path, *["long"] * 3)
    process = elsewhere(folder, command)
    assert states(folder) == ["running", "running", "waiting"]
    with pytest.raises(ConfigError, match=f"is being run by process {process.pid} already"):
        run(folder, points, command)
    assert process.poll() is None and cancel(str(folder)) == 0
    assert "asked 3 points to stop" in capsys.readouterr().out
    process.wait(60)
    assert states(folder) == ["stopped", "stopped", "new"]
    assert cancel(str(folder)) == 0 and "nothing runs" in capsys.readouterr().out


def test_points_outlive_a_launcher_that_is_killed_and_are_still_known(tmp_path, elsewhere):
    folder, points, command = make(tmp_path, *["long"] * 3)
    process = elsewhere(folder, command)
    process.kill()
    process.wait()
    assert states(folder) == ["running", "running", "new"]
    assert cancel(str(folder)) == 0
    until(lambda: states(folder) == ["stopped", "stopped", "new"])


def test_a_pid_that_another_process_got_since_is_not_the_point(tmp_path):
    folder, _, _ = make(tmp_path, "ok")
    processes = Processes(folder)
    processes.write({1: os.getpid()})
    assert processes.points() == {1: os.getpid()} and processes.launcher() == os.getpid()
    recorded = processes.read()
    recorded["points"]["1"]["start"] -= 1
    recorded["launcher"]["start"] -= 1
    (folder / "processes.json").write_text(json.dumps(recorded))
    assert processes.points() == {} and processes.launcher() is None
    recorded["host"] = "elsewhere"
    (folder / "processes.json").write_text(json.dumps(recorded))
    assert processes.elsewhere() == "elsewhere"
    assert "started on elsewhere" in standings(folder)[0].note
    with pytest.raises(ConfigError, match="runs on elsewhere. Cancel it there."):
        cancel(str(folder))


def test_a_sweep_folder_is_read_back(tmp_path, monkeypatch):
    folder, points, command = make(tmp_path, "ok", "ok")
    assert read_points(folder) == points
    assert (folder / "points.txt").read_text().splitlines()[1] == str(folder / points[1].folder)
    add_job(folder, "7", [1, 2])
    assert read_sweep(folder)["jobs"] == [{"job": "7", "points": [1, 2]}]
    assert read_sweep(folder)["command"] == "entrl sweep seed=1,2"
    assert find(str(folder)) == folder
    folder.rename(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "it")
    (tmp_path / "runs").mkdir()
    (tmp_path / "it").rename(tmp_path / "runs" / "it")
    monkeypatch.chdir(tmp_path)
    assert find("it") == Path("runs/it")
    with pytest.raises(CheckpointError, match="runs is no sweep: runs/sweep.json is not there"):
        find("runs")


def test_progress_is_the_last_whole_line(tmp_path):
    assert progress(tmp_path) == Progress()
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "entropy/mean": 0.1}\n{"step": 3'
    )
    assert progress(tmp_path) == Progress(2, None, 0.1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n')
    assert progress(tmp_path) == Progress(1)
    assert summary_value(tmp_path, "eval.after.pass@1") is None and reason(tmp_path) == ""
    (tmp_path / "summary.json").write_text('{"eval": {"after": {"pass@1": 0.5}}, "text": "x"}')
    assert summary_value(tmp_path, "eval.after.pass@1") == 0.5
    assert summary_value(tmp_path, "eval.before.pass@1") is None and summary_value(tmp_path, "text") is None
