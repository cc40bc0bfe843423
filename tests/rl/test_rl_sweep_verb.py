"""entrl sweep as a user meets it: folders, retry, status, Slurm; the points themselves are played by tests/fake_run.py but for one."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from command_line import SMALL, entrl, fails, metrics
from fake_run import fake
from rl import rundir, slurm
from rl.config import compose
from rl.sweep.status import standings
from rl.sweep.verb import retry, sweep

QUICK = [*SMALL, "eval.before=false", "eval.after=false"]


def run(tmp_path, command, *words):
    words = [*QUICK, f"run.dir={tmp_path}", "sweep.name=it", *words]
    return sweep(words, None, ["sweep", *words], command)


def states(tmp_path):
    return [s.state for s in standings(tmp_path / "it")]


def test_every_point_becomes_a_run_folder_that_says_what_it_is(tmp_path, capsys):
    assert run(tmp_path, fake(tmp_path), "plugin=[],[steer]", "seed=1,2", "sweep.limit=4") == 0
    said = capsys.readouterr().out
    folder = tmp_path / "it"
    assert f"{folder}: 4 done" in said and "start    004_plugin-steer_seed-2" in said and "0.750" in said
    lines = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["folder"] == "004_plugin-steer_seed-2" and lines[3]["overrides"][-2:] == [
        "plugin=[steer]",
        "seed=2",
    ]
    written = compose((folder / lines[3]["folder"] / "overrides.txt").read_text().splitlines())
    assert (written.seed, list(written.plugin)) == (2, ["steer"])
    assert (written.run.dir, written.run.name, written.run.group) == (str(folder), lines[3]["folder"], "it")
    # the command of a point is a command line of its own
    typed = shlex.split((folder / lines[3]["folder"] / "command.sh").read_text())
    assert typed[:2] == ["entrl", "train"] and compose(typed[2:]) == written


def test_a_dry_run_checks_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, ["false"], "seed=1,2", "dry_run=true") == 0
    assert "2 points would go to" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_name_is_made_up_from_what_varies(tmp_path):
    words = [*QUICK, f"run.dir={tmp_path / 'runs'}", "seed=1,2", "plugin.fork_mask.rho=0.1,0.2"]
    assert sweep(words, None, ["sweep"], fake(tmp_path)) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("seed+rho_") and len(made.name) == len("seed+rho_abcd")


def test_points_that_would_not_run_are_all_named_and_nothing_is_written(tmp_path, capsys):
    words = ["trainer.num_generations=8,7", "seed=1,2", f"run.dir={tmp_path}"]
    assert entrl("sweep", *QUICK, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("entrl: 2 of 4 points cannot run; nothing was written:\n  x points 3-4: ")
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_a_taken_name_is_refused(tmp_path, capsys):
    (tmp_path / "it").mkdir()
    said = fails(capsys, "sweep", *QUICK, f"run.dir={tmp_path}", "sweep.name=it", "seed=1,2")
    assert "it exists already. Give another sweep.name" in said
    for bad in ("a/b", "..", "a=b"):
        said = fails(capsys, "sweep", *QUICK, f"run.dir={tmp_path}", f"sweep.name={bad}", "seed=1,2")
        assert f"sweep.name={bad} is no name of a folder" in said


def test_retry_runs_what_did_not_finish_and_leaves_the_rest(tmp_path, capsys):
    command = fake(tmp_path, "ok", "crash", "die", "ok")
    assert run(tmp_path, command, "seed=1,2,3,4") == 1
    assert states(tmp_path) == ["done", "failed", "failed", "done"]
    said = capsys.readouterr().out
    assert "ValueError: no such luck" in said and "killed by signal 9" in said
    assert f"entrl sweep retry {tmp_path / 'it'}" in said
    fake(tmp_path, "crash", "ok", "ok", "crash")
    (tmp_path / "it" / "003_seed-3" / "FAILED").unlink()  # as if killed together with its launcher
    assert states(tmp_path)[2] == "lost"
    assert retry(str(tmp_path / "it"), ["launcher.at_once=2"], command) == 0
    assert states(tmp_path) == ["done"] * 4
    assert [len((p / "starts").read_text().split()) for p in sorted((tmp_path / "it").glob("0*"))] == [1, 2, 2, 1]
    capsys.readouterr()
    assert retry(str(tmp_path / "it"), [], ["false"]) == 0 and "nothing to run again" in capsys.readouterr().out


def test_what_status_retry_and_cancel_do_not_take(tmp_path, capsys):
    assert run(tmp_path, fake(tmp_path, "crash"), "seed=1,2") == 1
    folder = str(tmp_path / "it")
    for words, said in (
        (["status"], "entrl sweep status needs the folder of a sweep"),
        (["status", str(tmp_path)], "is no sweep"),
        (["status", folder, "seed=1"], "takes no overrides, and got seed=1"),
        (["cancel", folder, "seed=1"], "takes no overrides, and got seed=1"),
        (["retry", folder, "seed=1"], "a retry runs the points as they are"),
        (["retry", folder, "slurm.tme=1"], "slurm.tme=1: Key 'tme'"),
        (["retry", folder, "launcher.at_once=0"], "launcher.at_once=0 does not work"),
        (["statsu", folder], "'statsu' is no override"),
    ):
        capsys.readouterr()
        assert said in fails(capsys, "sweep", *words)
    assert entrl("sweep", "status", folder) == 0 and "1 done, 1 failed" in capsys.readouterr().out


@pytest.fixture
def cluster(monkeypatch):
    """Slurm as seen through rl.slurm: job arrays that run nothing, whose tasks are in the state that the test gives them."""
    tasks, cancelled = {}, []

    def submit(script):
        job = str(100 + len(list(script.parent.glob("job_*.sbatch"))))
        array = next(line for line in script.read_text().splitlines() if line.startswith("#SBATCH --array="))
        for task in array.partition("=")[2].partition("%")[0].split(","):
            tasks[f"{job}_{task}"] = "PENDING"
        return job

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "states", lambda jobs: {t: s for t, s in tasks.items() if t.split("_")[0] in jobs})
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    return tasks, cancelled


def test_slurm_gets_one_array_and_nobody_waits(tmp_path, cluster, capsys):
    tasks, cancelled = cluster
    nodes = ["engine=ddp", "slurm.gpus_per_node=4"]
    assert run(tmp_path, ["false"], "seed=1,2,3", "launcher=slurm", "launcher.at_once=2", *nodes) == 0
    assert "job        101, 3 tasks of one array" in capsys.readouterr().out
    folder = tmp_path / "it"
    script = (folder / "job_1.sbatch").read_text()
    assert "--array=1,2,3%2" in script and "--ntasks-per-node=4\n" in script and str(folder / "points.txt") in script
    assert (folder / "points.txt").read_text().splitlines()[2] == str(folder / "003_seed-3")
    assert states(tmp_path) == ["waiting"] * 3

    tasks |= {"101_1": "RUNNING", "101_2": "TIMEOUT"}
    rundir.finish(folder / "001_seed-1", "STOPPED", "SIGUSR1")  # preempted, and running again
    assert states(tmp_path) == ["running", "lost", "waiting"]
    assert "job 101_2 TIMEOUT" in standings(folder)[1].note
    rundir.finish(folder / "001_seed-1", "DONE")
    assert retry(str(folder), ["slurm.time=1:30:00"]) == 0
    script = (folder / "job_2.sbatch").read_text()
    assert "--array=2%2\n" in script and "--time=1:30:00" in script
    assert states(tmp_path) == ["done", "waiting", "waiting"]
    tasks["102_2"] = "FAILED"
    rundir.finish(folder / "002_seed-2", "FAILED", "out of luck")
    assert states(tmp_path) == ["done", "failed", "waiting"]

    assert entrl("sweep", "cancel", str(folder)) == 0 and cancelled == ["101", "102"]
    tasks["101_3"] = "CANCELLED"
    assert states(tmp_path) == ["done", "failed", "lost"]
    for task in list(tasks):  # forgotten, as a cluster without accounting does after a while
        del tasks[task]
    assert states(tmp_path) == ["done", "failed", "new"]


def test_a_sweep_that_slurm_does_not_take_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said = fails(capsys, "sweep", *QUICK, f"run.dir={tmp_path}", "launcher=slurm", "seed=1,2")
    assert "sbatch" in said and not list(tmp_path.iterdir())


def test_a_real_sweep_of_two_points_from_end_to_end(tmp_path, capsys):
    words = [*QUICK, "plugin=[],[fork_mask]", f"run.dir={tmp_path}", "sweep.name=it", "launcher.at_once=2"]
    assert entrl("sweep", *words) == 0
    capsys.readouterr()
    assert entrl("sweep", "status", str(tmp_path / "it")) == 0
    said = capsys.readouterr().out
    assert "2 done" in said and "[fork_mask]" in said and "2/2" in said
    for name, plugins in (("001_plugin-none", []), ("002_plugin-fork_mask", ["fork_mask"])):
        lines = metrics(tmp_path / "it" / name)
        assert [line["step"] for line in lines] == [1, 2]
        assert [k for k in lines[0] if k.endswith("/touched")] == [f"plugin/{p}/touched" for p in plugins]
        assert (tmp_path / "it" / name / "checkpoints" / "final").is_dir()


def test_status_needs_none_of_the_slow_libraries(tmp_path):
    assert run(tmp_path, fake(tmp_path), "seed=1,2") == 0
    code = "import sys, rl.cli; rl.cli.main(sys.argv[1:]); print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, "sweep", "status", str(tmp_path / "it")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("set()")
