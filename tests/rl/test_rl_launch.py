"""Whole runs: launched, stopped by signals, resumed exactly, failing well. Each start is a process of its own."""

import json
import os
import signal
import time

import pytest

from rl.checkpoint import manifest_of, newest_good
from rl.cli import main
from rl.errors import DONE, LEFT, REQUEUE
from rl.rundir import state
from runs import SMALL, TWO, assert_equal_runs, finish, lines, start, wait_for_step

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rl.rank")


def train(folder, *overrides):
    return ["train", *SMALL, f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides]


def stopped_after(folder, number, step, *overrides):
    """Start a run, send it a signal once it has logged a step, and give its exit code and output."""
    process = start("rl.cli", *train(folder, *overrides), out=folder.with_suffix(".txt"))
    try:
        wait_for_step(folder, step, process)
        process.send_signal(number)
        return process.wait(120), folder.with_suffix(".txt").read_text()
    finally:
        process.kill()


def test_a_signal_ends_with_a_checkpoint_and_resume_ends_as_if_nothing_had_been(tmp_path, capsys):
    """Two epochs of the data, so the order of the second one has to be found again. While it goes on nobody else may."""
    straight, other = tmp_path / "straight", tmp_path / "other"
    steps = ["trainer.max_steps=50", "checkpoint.every=20", "engine.threads=1"]
    assert main(train(straight, *steps)) == DONE
    process = start("rl.cli", *train(other, *steps), out=tmp_path / "other.txt")
    try:
        wait_for_step(other, 1, process)
        process.send_signal(signal.SIGSTOP)  # it might be done before the next line is
        assert main(["resume", str(other)]) == 2
        assert "is being trained by another process" in capsys.readouterr().err and state(other) == "open"
        process.send_signal(signal.SIGCONT)
        wait_for_step(other, 23, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == REQUEUE
    finally:
        process.kill()
    assert "SIGTERM: stopping at the end of this step" in (tmp_path / "other.txt").read_text()
    assert state(other) == "stopped" and f"entrl resume {other}" in (other / "STOPPED").read_text()
    at = len(lines(other))
    assert 23 <= at < 50 and (other / "checkpoints" / f"checkpoint-{at}").is_dir()
    again = [*train(other, *steps), "resume=auto"]
    code, said = finish("rl.cli", *again, out=tmp_path / "again.txt")
    assert code == DONE and f"checkpoint-{at}" in said and state(other) == "done"
    assert_equal_runs(straight, other)
    capsys.readouterr()
    assert main(again) == DONE
    assert capsys.readouterr().out == f"{other} is finished: 50 steps. Nothing to do.\n"


def test_two_ranks_under_deepspeed_stop_together_and_go_on_exactly(tmp_path):
    """The launcher hands the signal on; the second start is torchrun's, on the same folder."""
    straight, other = tmp_path / "straight", tmp_path / "other"
    run = ["engine=zero2", *TWO, "trainer.max_steps=20", "checkpoint.every=null", "eval.before=false"]
    assert finish("rl.cli", *train(straight, *run), out=tmp_path / "straight.txt")[0] == DONE
    code, said = stopped_after(other, signal.SIGUSR1, 5, *run)
    assert code == REQUEUE and state(other) == "stopped", said
    assert manifest_of(newest_good(other / "checkpoints"))["facts"]["engine"] == "zero2"
    code, said = finish(*TORCHRUN, other, out=tmp_path / "again.txt")
    assert code == DONE and "resumes" in said, said
    assert_equal_runs(straight, other)
    assert sorted(p.name for p in (other / "logs" / "attempt_2").iterdir()) == ["rank_0.log", "rank_1.log"]
    assert "step " not in (other / "logs" / "attempt_2" / "rank_1.log").read_text()  # only the first rank tells


def test_zero_3_trains_and_evaluates_as_one_process_does(tmp_path):
    """Problems that do not divide among the ranks, so one has nothing to draw while the other does."""
    one, two = tmp_path / "one", tmp_path / "two"
    run = ["trainer.max_steps=2", "plugin=[fork_mask]", "eval.batch_size=2", "data.heldout.count=3"]
    shard = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    assert main(train(one, *run, "trainer.per_device_train_batch_size=32")) == DONE
    code, said = finish("rl.cli", *train(two, *run, "engine=zero3", *TWO, shard), out=tmp_path / "2")
    assert code == DONE, said
    a, b = (json.loads((folder / "summary.json").read_text())["eval"]["before"] for folder in (one, two))
    assert b == pytest.approx(a, rel=1e-4)
    assert b["pass@1"] == a["pass@1"] and len(lines(two)) == 2


BROKEN = """
import json, os
def reward(prompts, completions, **columns):
    step = columns["trainer_state"].global_step
    if step == 1:
        with open(f"rank_{os.environ['RANK']}", "w") as file:
            json.dump([prompts, completions], file)
    if os.environ.get("RANK") == "1" and step == 2:
        raise ValueError("the second rank broke")
    return [float(len(c)) for c in completions]
"""


def test_the_first_failing_rank_has_the_last_word(tmp_path):
    """The reward lies where the run is started, beside a package that has the name of one of ours. Ranks share a prompt."""
    (tmp_path / "broken_reward.py").write_text(BROKEN)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    reward = "reward.correct.fn={_target_: broken_reward.reward, _partial_: true}"
    shared = ["engine=ddp", "engine.processes=2", "trainer.num_generations=32"]
    run = train(tmp_path / "run", *shared, "trainer.max_steps=5", "eval.before=false", reward)
    code, said = finish("rl.cli", *run, out=tmp_path / "out.txt", PYTHONSAFEPATH="1")
    assert code == 2, said  # a reward is the user's
    last = said[said.rindex("\nrank 1 of 2 ") :]
    assert "the second rank broke" in last and "Connection closed" not in last, said
    assert state(tmp_path / "run") == "failed" and "the second rank broke" in (tmp_path / "run" / "FAILED").read_text()
    (a, b), (c, d) = (json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in (0, 1))
    assert a == c and len(set(map(str, a))) == 1 and b != d  # each has random numbers of its own


def test_a_second_interrupt_leaves_at_once_and_what_is_on_disk_is_whole(tmp_path):
    (tmp_path / "slow_reward.py").write_text(
        "import time\ndef reward(prompts, completions, **columns):\n"
        "    time.sleep(30 if columns['trainer_state'].global_step == 3 else 0)\n    return [float(len(c)) for c in completions]\n"
    )
    run, reward = tmp_path / "run", "reward.correct.fn={_target_: slow_reward.reward, _partial_: true}"
    arguments = train(run, "trainer.max_steps=9", "checkpoint.every=2", "eval.before=false", reward)
    process = start("rl.cli", *arguments, out=tmp_path / "out.txt")
    try:
        wait_for_step(run, 3, process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # it waits for the end of the step
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == LEFT
    finally:
        process.kill()
    assert state(run) == "open" and newest_good(run / "checkpoints").name == "checkpoint-2"


def test_prepare_writes_a_folder_and_says_what_cannot_be_started_here(tmp_path, capsys):
    """16 processes x 16 completions."""
    far = tmp_path / "far"
    run = ["prepare", *train(far)[1:], "engine=zero3", "engine.processes=8", "engine.nodes=2"]
    assert main(run) == 0 and capsys.readouterr().out == f"{far}\n"
    files = {"command.sh", "config.yaml", "deepspeed.json", "manifest.json", "overrides.txt"}
    assert set(os.listdir(far)) == files
    code, said = finish("rl.launch", far, out=tmp_path / "out.txt")
    assert code == 2 and "is for 2 nodes" in said and "--nnodes 2 --nproc-per-node 8" in said
    assert set(os.listdir(far)) == files


def test_another_launcher_does_not_start_the_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(train(tmp_path / "run")) == 2
    assert "starts its processes itself" in capsys.readouterr().err and not (tmp_path / "run").exists()
