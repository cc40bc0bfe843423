"""Jobs on a real Slurm, with a small program in the place of rl.rank; test_rl_slurm_train.py trains."""

import socket

import pytest

from rl import slurm
from rl.config import compose
from rl.errors import ConfigError
from slurm_lab import cluster, ended, free_ports, output, wait_for  # noqa: F401

RANK = '''
"""Counts steps; keeps the contract of rl.rank about signals, markers and exit codes."""
import os, pathlib, signal, sys, time

told = []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
signal.signal(signal.SIGTERM, lambda number, frame: None)
run, rank = pathlib.Path(sys.argv[1]), int(os.environ["SLURM_PROCID"])
attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
logs = run / "logs" / f"attempt_{attempt}"
logs.mkdir(parents=True, exist_ok=True)
(run / "STOPPED").unlink(missing_ok=True)
steps = run / f"steps_{rank}"
goal = int((run / "goal").read_text())
done = int(steps.read_text()) if steps.exists() else 0
print("rank", rank, "of", os.environ["SLURM_NTASKS"], "on", os.environ["SLURMD_NODENAME"], "from step", done)
print(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ.get("ENTRL_VLLM_HOST"))
(run / f"place_{rank}").write_text(os.environ["SLURMD_NODENAME"])
if (run / f"fail_{rank}").exists():
    time.sleep(0.3)
    (logs / f"rank_{rank}.error").write_text(f"RewardError: rank {rank} met a bad row\\n")
    sys.exit(1)
(run / f"started_{attempt}_{rank}").touch()  # after goal was read
while done < goal and not told:
    time.sleep(0.05)
    done += 1
steps.write_text(str(done))
if told:
    time.sleep(1.5 * (1 - rank))  # rank 0 still writes when rank 1 has ended
    if rank == 0:
        (run / "STOPPED").write_text(f"SIGUSR1 at step {done}\\n")
    sys.exit(85)
if rank == 0:
    (run / "DONE").touch()
'''
SERVER = """
import http.server, sys, time

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

print(sys.argv[1:], flush=True)
time.sleep(1)
http.server.HTTPServer(("0.0.0.0", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""
TWO_NODES = ["engine=ddp", "engine.processes=1", "engine.nodes=2", "slurm.partition=low", "logger=none"]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A run folder of a name that shells dislike; ``rl.rank`` of its jobs counts to ``goal``."""
    for name, code in {"rl/rank.py": RANK, "trl/cli/main.py": SERVER}.items():
        file = tmp_path / "stub" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    for package in ("rl", "trl", "trl/cli"):
        (tmp_path / "stub" / package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    for name in ("MASTER_ADDR", "ENTRL_VLLM_HOST"):
        monkeypatch.setenv(name, "127.0.0.1")  # n1 and n2 are names that nobody can look up
    return lambda name='it\'s "a" $run 100%': run_folder(tmp_path, name)


def run_folder(folder, name, goal=4):
    run = folder / name
    run.mkdir()
    (run / "goal").write_text(str(goal))
    return run


def start(run, *overrides):
    """Submit a run folder; its job, and what its log says so far."""
    (run / "job.sbatch").write_text(slurm.render(compose([*TWO_NODES, *overrides]), run))
    job = slurm.submit(run / "job.sbatch")
    return job, lambda: (run / "logs" / f"slurm_{job}.out").read_text()


def port_of(job):
    return 20000 + int(job) % 12000


def running(run, attempt=1):
    """Both ranks have begun to count."""
    wait_for(lambda: all((run / f"started_{attempt}_{rank}").exists() for rank in (0, 1)))


def signalled(job):
    assert not output("scancel", "--batch", "--signal=USR1", job)


@pytest.mark.usefixtures("cluster")
def test_two_ranks_on_two_nodes_and_a_log_in_the_run_folder(job):
    run = job()
    number, log = start(run)
    assert ended(number) == "COMPLETED" and (run / "DONE").exists()
    assert {(run / f"place_{rank}").read_text() for rank in (0, 1)} == {"n1", "n2"}
    assert "rank 1 of 2" in log() and f"127.0.0.1 {port_of(number)} 127.0.0.1" in log()


@pytest.mark.usefixtures("cluster")
def test_ranks_meet_at_the_next_port_where_theirs_is_taken(job):
    first, _ = start(job("first"))
    number = str(int(first) + 1)
    with socket.create_server(("127.0.0.1", port_of(number))):
        assert ended(first) == "COMPLETED"
        second, log = start(job("second"))
        assert second == number and ended(second) == "COMPLETED"
    assert f"127.0.0.1 {port_of(number) + 1} 127.0.0.1" in log()


@pytest.mark.usefixtures("cluster")
def test_usr1_stops_with_a_checkpoint_requeues_and_goes_on(job):
    run = job()
    (run / "goal").write_text("10000")
    number, log = start(run)
    running(run)
    (run / "goal").write_text("3")  # of the next start
    signalled(number)
    wait_for(lambda: "in the queue again" in log())
    assert (run / "STOPPED").read_text().startswith("SIGUSR1")  # rank 0 was let finish
    reached = int((run / "steps_0").read_text())
    assert ended(number) == "COMPLETED" and (run / "DONE").exists()
    assert f"from step {reached}" in log() and "start 2 of job" in log() and "from step 0" in log()


@pytest.mark.usefixtures("cluster")
def test_a_job_of_more_priority_preempts_and_the_run_comes_back(job):
    run, urgent = job(), job("urgent")
    (run / "goal").write_text("10000")
    number, log = start(run, "slurm.time='10'")
    running(run)
    (run / "goal").write_text("3")
    other, _ = start(urgent, "slurm.partition=high", "slurm.cpus_per_task=2")  # all of both nodes
    assert ended(other) == "COMPLETED" and "got USR1" in log()
    reached = (run / "steps_0").read_text()
    assert ended(number) == "COMPLETED" and (run / "DONE").exists()
    assert log().count("start 2 of job") == 1 and f"rank 0 of 2 on n1 from step {reached}" in log()


@pytest.mark.usefixtures("cluster")
def test_the_error_of_the_rank_that_failed_is_the_last_word(job):
    run = job()
    (run / "goal").write_text("10000")
    old = run / "logs" / "attempt_0" / "rank_0.error"
    old.parent.mkdir(parents=True)
    old.write_text("of another day\n")
    (run / "fail_1").touch()
    number, log = start(run)
    assert ended(number) == "FAILED" and slurm.states([number]) == {number: "FAILED"}
    assert log().endswith("exit code 1; the first rank that failed was rank_1:\nRewardError: rank 1 met a bad row\n")
    assert (run / "FAILED").read_text() == "RewardError: rank 1 met a bad row\n"
    assert not (run / "steps_0").exists()  # the other rank was ended too


@pytest.mark.usefixtures("cluster")
def test_a_cancelled_job_stops_with_a_checkpoint_and_stays_away(job):
    run = job()
    (run / "goal").write_text("10000")
    number, log = start(run)
    running(run)
    slurm.cancel([number])
    assert ended(number) == "CANCELLED"
    wait_for(lambda: "CANCELLED" in log())
    assert slurm.states([number]) == {number: "CANCELLED"} and "in the queue again" not in log()
    slurm.cancel([number])  # once more is no error


@pytest.mark.usefixtures("cluster")
def test_an_array_trains_the_points_asked_for_and_requeues_only_the_one_that_stopped(job, tmp_path):
    sweep = tmp_path / "a sweep"
    sweep.mkdir()
    runs = [job(f"point {i} it's") for i in (1, 2, 3, 4)]
    (sweep / "points.txt").write_text("".join(f"{run}\n" for run in runs))
    (runs[3] / "goal").write_text("10000")
    cfg = compose(["engine=ddp", "engine.processes=1", "slurm.partition=low", "launcher=slurm", "launcher.at_once=2"])
    (sweep / "job.sbatch").write_text(slurm.render_array(cfg, sweep, [1, 3, 4]))
    number = slurm.submit(sweep / "job.sbatch")
    tasks = [f"{number}_{i}" for i in (1, 3, 4)]
    assert sorted(slurm.states([number])) == tasks and list(slurm.states([tasks[1]])) == [tasks[1]]
    wait_for(lambda: (runs[3] / "started_1_0").exists())
    (runs[3] / "goal").write_text("3")
    signalled(tasks[2])
    assert [ended(task) for task in tasks] == ["COMPLETED"] * 3
    assert [(run / "DONE").exists() for run in runs] == [True, False, True, True]
    assert "start 2 of job" in (runs[3] / "logs" / f"slurm_{tasks[2]}.out").read_text()
    assert "start 2 of job" not in (runs[0] / "logs" / f"slurm_{tasks[0]}.out").read_text()


@pytest.mark.usefixtures("cluster")
def test_a_vllm_server_gets_a_node_of_its_own(job):
    run = job()
    server = [
        "rollout=vllm_server",
        "rollout.server.gpus=2",
        f"trainer.vllm_server_port={free_ports(1)[0]}",
    ]
    number, log = start(run, "engine=single", "engine.processes=1", "engine.nodes=1", *server)
    assert ended(number) == "COMPLETED", log()
    assert (run / "place_0").read_text() == "n1"
    assert "Connection refused" not in log()
    said = (run / "logs" / f"server_{number}.log").read_text()
    assert "'vllm-serve', '--model'" in said and "'--tensor_parallel_size', '2'" in said


@pytest.mark.usefixtures("cluster")
def test_what_sbatch_does_not_take_is_one_sentence(job):
    with pytest.raises(ConfigError, match=r"invalid partition specified: nope\. That is what Slurm's sbatch says"):
        start(job(), "slurm.partition=nope")
    assert slurm.states(["987654"]) == {} and slurm.states([]) == {}


def tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_accounting_knows_what_squeue_has_forgotten(tmp_path, monkeypatch):
    """The words are those of sacct 22.05."""
    tool(tmp_path, "squeue", "echo '7|RUNNING'; echo '10_2|PENDING'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool(
        tmp_path,
        "sacct",
        "echo '5|CANCELLED by 0'; echo '6_1|COMPLETED'; echo '6_2|OUT_OF_MEMORY'; echo '10_1|FAILED'; echo '9_[1,4-5%2]|CANCELLED by 0'",
    )
    never = dict.fromkeys(("9_1", "9_4", "9_5"), "CANCELLED")
    assert slurm.states(["5", "6", "7", "8", "9", "10"]) == {
        "5": "CANCELLED",
        "6_1": "COMPLETED",
        "6_2": "OUT_OF_MEMORY",
        "7": "RUNNING",
        **never,
        "10_1": "FAILED",
        "10_2": "PENDING",
    }
    assert slurm.states(["9_4"]) == {"9_4": "CANCELLED"}
    tool(tmp_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.states(["5", "7"]) == {"7": "RUNNING"}


def test_without_slurm_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: slurm.submit(tmp_path / "job.sbatch"), lambda: slurm.states(["1"])):
        with pytest.raises(ConfigError, match="is not found: this machine has no Slurm"):
            call()
