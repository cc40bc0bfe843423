"""Whole runs in processes of their own: they get signals, have several ranks, and end with exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# a step is some 10 ms of work; a run of several ranks starts in about 10 s
SMALL = [
    "trainer.per_device_train_batch_size=16",
    "trainer.warmup_steps=0",
    "data.train.count=96",
    "data.heldout.count=4",
    "eval.samples=2",
    "eval.ks=[1,2]",
    "record.every=0",
    "logger.mode=disabled",
]
TWO = ["engine.processes=2", "trainer.num_generations=8"]


def environment(**more):
    """Without what pytest or another run has left there."""
    left = ("RANK", "WORLD", "LOCAL_", "MASTER_", "PYTEST", "ACCELERATE", "SLURM", "ENTRL")
    env = {k: v for k, v in os.environ.items() if not k.startswith(left)}
    paths = [str(ROOT), str(ROOT / "tests"), *more.pop("paths", [])]
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | more


def start(module, *arguments, out, **env):
    """A process whose output goes to ``out``."""
    with open(out, "w") as stream:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment(**env), cwd=out.parent
        )


def finish(module, *arguments, out, **env):
    """Exit code and output."""
    process = start(module, *arguments, out=out, **env)
    try:
        return process.wait(300), out.read_text()
    finally:
        process.kill()


def wait_for_step(folder, step, process):
    """Until the run has logged this step, or has ended."""
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.02)


def lines(folder):
    """metrics.jsonl without what no two runs have in common."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in found]


def weights(folder):
    return load_file(folder / "checkpoints" / "final" / "model.safetensors")


def assert_equal_runs(a, b):
    """The same lines and parameters to the last bit, and every step once."""
    assert [line["step"] for line in lines(b)] == list(range(1, len(lines(a)) + 1))
    assert lines(a) == lines(b)
    for name, value in weights(a).items():
        assert (value == weights(b)[name]).all(), name
