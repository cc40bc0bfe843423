"""Two ranks go on exactly too, each with its own rollouts, and recorded or not: data parallel, ZeRO-2, ZeRO-3."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from data import countdown
from ranks import two_ranks
from rl.checkpoint import Checkpoints, manifest_of, newest_good
from rl.errors import CheckpointError, ConfigError
from rl.plugins.fork_mask import ForkMask
from rl.probes import Probes
from rl.recorder import Recorder
from tiny import EntropyTrainer, make_trainer, save_model

STEPS, MIDDLE = 5, 3  # two updates on each rollout: step 3 is between the two on the second


def join(stage, folder):
    """Make accelerate see the two gloo processes, with DeepSpeed on a machine without a GPU."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    if stage is None:
        return {"ddp_backend": "gloo"}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo does it as well
    os.environ.update(
        DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=f"{folder}/zero.json"
    )
    return {"ddp_backend": "gloo", "use_cpu": False}


def build(model, folder, changes, record=None):
    lines = []

    def sink(step, metrics, histograms):
        lines.append([step, {n: v for n, v in metrics.items() if not n.startswith("time/")}])

    trainer = make_trainer(
        EntropyTrainer,
        model,
        folder,
        {"mask": ForkMask(rho=0.8, scope="rollout")},
        extra={
            "checkpoints": Checkpoints(folder, every=MIDDLE, keep_last=None),
            "sinks": [sink],
            "recorder": record and Recorder(record / "rollouts", every=1, max_rows=9),  # of 16: 8 and 1
        },
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1},
        **{"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": STEPS, **changes},
    )
    if record:
        problems = countdown.dataset("heldout", [3], 3, seed=0).to_list()
        trainer.add_callback(Probes(trainer, record / "probes", problems, lambda **_: [1.0] * 6, every=1, seed=5))
    return trainer, lines


def whole(trainer):
    found = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # under ZeRO-3 on the main process only
    return {k: v.clone() for k, v in (found or {}).items()}


def straight_and_again(rank, model, folder, stage):
    changes = join(stage, folder)
    straight, expected = build(model, f"{folder}/runs", changes, record=Path(folder))
    straight.train()
    weights = whole(straight)
    again, lines = build(model, f"{folder}/runs", changes)
    again.train(f"{folder}/runs/checkpoint-{MIDDLE}")
    mine = whole(again)
    if stage is None:
        with pytest.raises(
            CheckpointError, match=r"go on from different steps \(\[0, 3\]\). Put run.dir on a file system"
        ):
            again.train(f"{folder}/runs/checkpoint-{MIDDLE}" if rank else None)
    if stage == 3:
        again.accelerator.state.deepspeed_plugin.zero3_save_16bit_model = False
        with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save is false.* Set it to true"):
            again.use_checkpoints(None)
    drawn = straight._buffered_inputs[0]["completion_ids"].sum()
    difference = max((float((weights[k] - mine[k]).abs().max()) for k in weights), default=0.0)
    return {"difference": difference, "parameters": len(mine), "expected": expected, "lines": lines, "drawn": drawn}


def check_records(folder, loaded):
    """Both ranks record their part, one of them probes, and both look with the weights that the checkpoint holds."""
    names = sorted(path.name for path in (folder / "rollouts").iterdir())
    assert names == sorted(f"step_{s:06d}{r}.parquet" for s in range(1, STEPS + 1) for r in ("", ".rank1"))
    names = sorted(path.name for path in (folder / "probes").iterdir())
    assert names == [f"step_{s:06d}.parquet" for s in range(STEPS + 1)]
    both = [pd.read_parquet(folder / "rollouts" / f"step_{MIDDLE:06d}{r}.parquet") for r in ("", ".rank1")]
    assert [len(frame) for frame in both] == [8, 1]
    probes = pd.read_parquet(folder / "probes" / f"step_{MIDDLE:06d}.parquet")
    rows = [
        *pd.concat(both).rename(columns={"logp": "before", "logp_after": "logp"}).itertuples(),
        *probes.itertuples(),
    ]
    for row in rows:
        prompt, ids = countdown.tokenizer()(row.prompt)["input_ids"], row.token_ids.tolist()
        with torch.no_grad():
            logp = loaded(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row.logp == pytest.approx(logp.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).numpy(), abs=1e-4)


@pytest.mark.parametrize("stage", [None, 2, 3], ids=["ddp", "zero2", "zero3"])
def test_two_ranks_go_on_in_the_middle_of_a_rollout(tmp_path, stage):
    model = save_model(tmp_path / "model", tied=False)
    config = {
        **{f"{name}": "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # or so small a model would never be partitioned
        },
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    ranks = two_ranks(straight_and_again, str(model), str(tmp_path), stage)
    assert all(found["difference"] == 0 for found in ranks) and ranks[0]["parameters"] > 20
    assert [step for step, _ in ranks[0]["lines"]] == [4, 5] and ranks[0]["lines"] == ranks[0]["expected"][MIDDLE:]
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    path = newest_good(tmp_path / "runs")
    manifest = manifest_of(path)
    assert manifest["processes"] == 2 and manifest["facts"]["engine"] == (f"zero{stage}" if stage else "ddp")
    assert {f"entrl_state_{r}.safetensors" for r in (0, 1)} | {f"rng_state_{r}.pth" for r in (0, 1)} <= set(
        manifest["files"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(path)
    check_records(tmp_path, loaded)
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters()
    )
