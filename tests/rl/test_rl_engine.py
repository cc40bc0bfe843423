"""Engines: what a configuration means, what a rank finds in its environment, what is refused."""

import json
import os
from contextlib import contextmanager

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from rl import engine as engines
from rl import launch, rundir
from rl.build import grpo_config
from rl.config import compose
from rl.engine import Engine, check_gpus, engine, enter, take_place, whole
from rl.errors import ConfigError
from rl.paths import configs_dir
from rl.preflight.brief import before_training


def of(*overrides, here=True):
    return engine(compose(list(overrides)), here)


def test_every_engine_composes_and_says_its_stage():
    stages = {"single": 0, "ddp": 0, "zero2": 2, "zero3": 3, "zero3_offload": 3}
    assert {p.stem for p in (configs_dir() / "engine").glob("*.yaml")} == set(stages)
    for name, stage in stages.items():
        count = 1 if name == "single" else 2
        found = of(f"engine={name}", f"engine.processes={count}")
        assert (found.name, found.stage, found.world, found.offload) == (name, stage, count, name.endswith("offload"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["engine.processes=2"], "engine=single is one process, not 2. Choose engine=ddp"),
        (["engine=ddp"], "engine.processes is not set"),
        (["engine=ddp", "engine.processes=0"], "engine.processes=0 does not work"),
        (["engine=ddp", "engine.processes=1.5"], "engine.processes=1.5 does not work"),
        (["engine=ddp", "engine.processes=2", "engine.nodes=true"], "engine.nodes=True does not work"),
        (["engine=zero2", "engine.processes=2", "engine.deepspeed.zero_optimization.stage=5"], "stage=5 is no stage"),
    ],
)
def test_what_does_not_work_is_said(overrides, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        of(*overrides)


def test_processes_default_to_the_gpus_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert of("engine=zero2").processes == 4
    with pytest.raises(ConfigError, match="nor is slurm.gpus_per_node"):
        of("engine=zero2", here=False)
    assert of("engine=zero2", "slurm.gpus_per_node=a100:8", here=False).processes == 8
    with pytest.raises(ConfigError, match="this machine has 4 GPUs"):
        check_gpus(of("engine=zero2", "engine.processes=8"))


def test_one_process_trains_on_one_gpu_where_there_are_more(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = grpo_config(compose(["trainer.use_cpu=false"]), str(tmp_path), [1.0])
    assert args.device.type == "cpu" and args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size


def test_deepspeed_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed. Run pip install"):
        of("engine=zero2", "engine.processes=2")


def test_a_place_comes_from_slurm_only_where_nobody_else_gave_one():
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "71234", **step}
    environ = dict(slurm)
    take_place(environ)
    found = {k: environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
    assert list(found.values()) == ["5", "1", "8", "4", str(20000 + 71234 % 20000)]
    named = {**slurm, "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
    take_place(named)
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("node7", "1234")
    given = {**slurm, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node7"}
    in_the_batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "71234"}
    for environ in (given, in_the_batch_script, {**slurm, "SLURM_STEP_NUM_TASKS": "1"}, {}):
        before = dict(environ)
        take_place(environ)
        assert environ == before


def test_deepspeed_gets_what_the_configuration_says_now(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("USE_DEEPSPEED", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_ZERO3_INIT"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for stage in (2, 3):
        found = of("engine=zero3", "engine.processes=1", f"engine.deepspeed.zero_optimization.stage={stage}")
        enter(tmp_path, found)
        assert json.loads((tmp_path / "deepspeed.json").read_text())["zero_optimization"]["stage"] == stage
        assert os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(tmp_path / "deepspeed.json")
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == ("true" if stage == 3 else "false")
        assert os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"]


def test_another_number_of_processes_than_prepared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ConfigError, match="prepared for 2 processes, and 3 were started.*torchrun --nnodes 1 --nproc-per-node 2"
    ):
        enter(tmp_path, Engine("ddp", 2, 1, None))


def test_the_files_say_auto_where_trl_decides():
    """DeepSpeed refuses numbers that differ from TRL's."""
    for name in ("zero2", "zero3"):
        options = yaml.safe_load((configs_dir() / "engine" / f"{name}.yaml").read_text())["deepspeed"]
        for key in (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
            "gradient_clipping",
        ):
            assert options[key] == "auto"


def test_whole_takes_hooks_away_for_the_time_being():
    class Accelerator:
        state = type("State", (), {"deepspeed_plugin": None})

        @staticmethod
        def unwrap_model(model):
            return model

    model, calls = torch.nn.Linear(2, 2), []
    model.is_gradient_checkpointing = False
    model.weight.ds_id = 0  # ZeRO-3's mark
    model.register_forward_pre_hook(lambda module, args: calls.append("before"))
    with whole(model, Accelerator()) as bare:
        bare(torch.ones(1, 2))
    assert not calls
    model(torch.ones(1, 2))
    assert calls == ["before"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        # 12 completions a rank, groups of 8
        (["reward=[majority_vote]", "trainer.per_device_train_batch_size=12"], "the group is split over ranks"),
        (
            ["plugin=[entropy_band]", "engine=zero3", "plugin.entropy_band.kl_coef=0.1"],
            "not implemented for weights that are sharded .here by ZeRO-3",
        ),
        (["trainer.per_device_train_batch_size=5"], "10 is not a multiple of 8"),
    ],
)
def test_what_several_ranks_cannot_do_is_found_before_they_start(overrides, says):
    cfg = compose(["engine=ddp", "engine.processes=2", "data.train.count=64", *overrides])
    with pytest.raises(ConfigError, match=says):
        before_training(cfg)


def test_what_several_ranks_can_do_passes():
    ready = before_training(compose(["engine=ddp", "engine.processes=2", "trainer.per_device_train_batch_size=4"]))
    assert ready.algebra.completions_per_rollout == 8 and ready.args.world_size == 2  # one group on two ranks


def test_ranks_get_what_the_server_leaves_them(tmp_path, monkeypatch):
    """The launcher waits for vLLM's server, and hands its environment to the ranks."""
    cfg = compose(["rollout=vllm_server", "engine=ddp", "engine.processes=2"])
    rundir.describe(tmp_path, OmegaConf.to_yaml(cfg), [], [], seed=1)
    seen = []

    @contextmanager
    def serving(server, log):
        seen.append((server.port, log.name))
        yield {"CUDA_VISIBLE_DEVICES": "0,1"}
        seen.append("ended")

    monkeypatch.setattr("rl.server.serving", serving)
    monkeypatch.setattr(launch.Launcher, "run", lambda self: seen.append((self.processes, self.environment)) or 85)
    assert launch.main([str(tmp_path)]) == 85
    assert seen == [(8000, "server.log"), (2, {"CUDA_VISIBLE_DEVICES": "0,1"}), "ended"]


def test_the_servers_gpus_are_not_the_trainings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert of("engine=zero2", "rollout=vllm_server", "rollout.server.gpus=2").processes == 6
    assert of("engine=zero2", "rollout=vllm_server", "rollout.server.launch=false").processes == 8
