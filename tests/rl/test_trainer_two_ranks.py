"""Two gloo ranks give what one process gives: series, histograms, parameters and recorded rollouts, on the same completions.

All cases of an engine are one start of two processes; tests/two_rank_train.py says what each is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import two_rank_train
from tiny import save_model

TESTS = Path(__file__).parents[1]
DDP = list(two_rank_train.CASES)
# the full-vocabulary KL is refused there; every other way in which ranks leave out work of their own
ZERO_3 = ["penalty", "live", "ahead", "idle", "empty", "empty live"]


def train_on_two_ranks(model, out, cases, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_", "PYTEST"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", **environment}
    command = [sys.executable, *launcher, str(TESTS / "two_rank_train.py"), str(model), str(out), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def model(folder):
    return save_model(folder / "model", tied=False)


@pytest.fixture(scope="module")
def one(folder, model):
    two_rank_train.main(str(model), str(folder / "one"), *DDP)
    return folder / "one"


@pytest.fixture(scope="module")
def ddp(folder, model):
    return train_on_two_ranks(model, folder / "ddp", DDP)


@pytest.fixture(scope="module")
def zero_3(folder, model):
    config = {
        **{f"{name}": "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # a threshold of 0, or so small a model would never be partitioned
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    }
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    return train_on_two_ranks(model, folder / "zero_3", ZERO_3, DS_ACCELERATOR="cpu", **environment)


def assert_one_process(one, two, case):
    lines, others = (json.loads((out / f"{case}.json").read_text()) for out in (one, two))
    assert len(lines) == len(others) >= 3
    for (metrics, counts), (other, other_counts) in zip(lines, others, strict=True):
        same = {name for name in metrics if not name.startswith(("time/", "mem/"))}
        assert same == {name for name in other if not name.startswith(("time/", "mem/"))}
        assert {m: other[m] for m in same} == pytest.approx({m: metrics[m] for m in same}, rel=1e-3, abs=1e-6)
        assert sum(counts) == sum(other_counts)
        assert sum(abs(a - b) for a, b in zip(counts, other_counts, strict=True)) <= 2  # at a bin's edge
    weights, other = (torch.load(out / f"{case}.pt", weights_only=True) for out in (one, two))
    for name in weights:
        torch.testing.assert_close(weights[name], other[name], rtol=1e-5, atol=1e-6)
    return [metrics for metrics, _ in lines]


@pytest.mark.parametrize("case", DDP)
def test_two_ranks_are_one_process(one, ddp, case):
    lines = assert_one_process(one, ddp, case)
    assert "rollout/distinct_answers" in lines[0] and all(metrics["policy/grad_norm"] > 0 for metrics in lines)


@pytest.mark.parametrize("case", ZERO_3)
def test_so_are_they_under_zero_3(one, zero_3, case):
    """Partitioned weights, gathered in forward and backward: ranks that left out a call of the model would hang."""
    assert_one_process(one, zero_3, case)


def test_the_cases_are_what_their_names_say(one):
    def series(case, name):
        return [metrics[name] for metrics, _ in json.loads((one / f"{case}.json").read_text())]

    assert set(series("live", "compute/scored")) == {1.0} and max(series("live", "compute/live")) < 1
    assert max(series("ahead", "compute/scored")) < 1 and max(series("recorded", "compute/scored")) < 1
    assert sum(series("ahead", "rollout/zero_std_groups")) > 0
    assert min(series("idle", "rollout/truncated")) == min(series("empty", "rollout/truncated")) == 0.5
    assert min(series("penalty", "policy/kl")[1:]) > 0 and sum(series("steer", "policy/clip_high")) > 0


@pytest.mark.parametrize("case", ["live", "split", "penalty"])
def test_the_ranks_record_what_one_process_would(one, ddp, case):
    """Whole first groups, in as many files as there are ranks with a part in them."""

    def rows(out):
        parts = [pd.read_parquet(path) for path in sorted((out / f"{case}.rollouts").glob("step_000002*.parquet"))]
        return len(parts), pd.concat(parts).sort_values(["group", "completion"], ignore_index=True)

    (files, found), (_, expected) = rows(ddp), rows(one)
    assert files == (1 if case == "penalty" else 2) and len(expected) == 10  # of 16, 12 and 32 completions a step
    columns = ["group", "completion", "reward"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])
    for column in ("entropy", "logp", "old_logp", "logp_after", "rank", "top_probs"):
        for own, other in zip(found[column], expected[column], strict=True):
            assert len(own) == len(other) and np.stack(own) == pytest.approx(np.stack(other), abs=1e-5), column
