"""Two gloo ranks give what one process gives: series, histograms and parameters, on the same completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny import save_model

TESTS = Path(__file__).parents[1]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*launcher, model, out, which, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_", "PYTEST"))}
    command = [sys.executable, *launcher, str(TESTS / "two_rank_train.py"), str(model), str(out), which]
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(f"{out}.json").read_text()), torch.load(f"{out}.pt", weights_only=True)


@pytest.mark.parametrize("which", ["penalty", "live", "ahead"])
def test_two_ranks_are_one_process(tmp_path, which):
    model = save_model(tmp_path / "model")
    one, weights = run(model=model, out=tmp_path / "one", which=which)
    two, other = run(*TWO, model=model, out=tmp_path / "two", which=which)
    assert len(one) == len(two) == 3
    for (metrics, counts), (others, other_counts) in zip(one, two, strict=True):
        same = [m for m in metrics if not m.startswith(("time/", "policy/loss"))]  # TRL's loss is one rank's own
        assert "rollout/distinct_answers" in same and "plugin/mask/kept" in same
        assert {m: others[m] for m in same} == pytest.approx({m: metrics[m] for m in same}, rel=2e-3, abs=1e-6)
        assert (
            sum(counts) == sum(other_counts) and sum(abs(a - b) for a, b in zip(counts, other_counts, strict=True)) <= 2
        )
        assert metrics["compute/scored"] < 1 if which == "ahead" else metrics["compute/scored"] == 1
    assert which == "penalty" or sum(metrics["rollout/zero_std_groups"] for metrics, _ in one) > 0
    for name in weights:
        torch.testing.assert_close(weights[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["live", "ahead"])
def test_under_zero_3_the_head_is_gathered_and_the_ranks_keep_step(tmp_path, which):
    """Partitioned weights, completions left out on each rank as they come: the same parameters as one process has."""
    model = save_model(tmp_path / "model", tied=False)
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
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}
    one, weights = run(model=model, out=tmp_path / "one", which=which)
    two, other = run(*TWO, model=model, out=tmp_path / "two", which=which, DS_ACCELERATOR="cpu", **zero)
    for (metrics, _), (others, _) in zip(one, two, strict=True):
        for name in ("entropy/mean", "compute/live", "compute/scored", "policy/grad_norm"):
            assert others[name] == pytest.approx(metrics[name], rel=1e-3)
    for name in weights:
        torch.testing.assert_close(weights[name], other[name], rtol=1e-4, atol=1e-5)
