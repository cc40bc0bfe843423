"""A training on two nodes that is preempted gives, when it comes back, what an undisturbed one gives."""

import pytest

from command_line import SMALL, entrl, metrics
from slurm_lab import cluster, ended, wait_for  # noqa: F401

TWO_NODES = [
    *("engine=ddp", "engine.processes=1", "engine.nodes=2", "engine.threads=1", "logger=none"),
    *("trainer.max_steps=20", "trainer.logging_steps=1", "eval.before=false", "eval.after=false"),
]


def submit(capsys, tmp_path, name, *overrides):
    """Submit as a person does; the job, the run folder and what its log says so far."""
    where = [f"run.dir={tmp_path}/my runs", f"run.name={name}"]
    assert entrl("slurm", "submit", *SMALL, *TWO_NODES, *where, *overrides) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    folder = tmp_path / "my runs" / name
    assert said["run"] == str(folder) and said["log"] == f"{folder}/logs/slurm_{said['job']}.out"
    return said["job"], folder, lambda: open(said["log"]).read()


@pytest.mark.usefixtures("cluster")
def test_a_preempted_training_goes_on_exactly(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    job, run, log = submit(capsys, tmp_path, "preempted", "slurm.partition=low")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3, 300)
    # the undisturbed one needs all of both nodes, and has the right to them
    other, undisturbed, _ = submit(capsys, tmp_path, "urgent", "slurm.partition=high", "slurm.cpus_per_task=2")
    assert ended(other, 300) == "COMPLETED" and "got USR1" in log() and (run / "STOPPED").exists()
    reached = len(metrics(run))
    assert 3 <= reached < 20
    assert ended(job, 300) == "COMPLETED", log()
    assert (run / "DONE").exists() and not (run / "STOPPED").exists() and "start 2 of job" in log()
    assert metrics(run) == metrics(undisturbed) and len(metrics(run)) == 20


@pytest.mark.usefixtures("cluster")
def test_what_slurm_does_not_take_leaves_nothing_and_a_live_job_is_not_doubled(tmp_path, capsys):
    where = [f"run.dir={tmp_path}", "run.name=it"]
    words = ["slurm", "submit", *SMALL, *TWO_NODES, *where]
    assert entrl(*words, "slurm.partition=nope") == 2
    assert "invalid partition specified: nope" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert entrl(*words, "slurm.partition=low", "slurm.extra=['--hold']") == 0
    job = capsys.readouterr().out.split()[1]
    assert entrl(*words, "slurm.partition=low", "slurm.extra=['--hold']", "resume=auto") == 2
    assert f"its job {job} has not ended" in capsys.readouterr().err
