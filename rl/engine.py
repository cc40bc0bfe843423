"""In how many processes a run trains, and what accelerate and DeepSpeed have to find in the environment for it.

Ranks come from whoever starts them: ``rl.launch``, torchrun or srun. Without a GPU the same engines run over gloo.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from trl.models import unwrap_model_for_generation

from rl.errors import ConfigError
from rl.rundir import write_text
from rl.slurm_site import gpus_per_node

_DEEPSPEED_FILE = "deepspeed.json"  # of a run folder; accelerate wants a file


@dataclass(frozen=True)
class Engine:
    """``processes`` on each of ``nodes``; ``stage`` is ZeRO's, 0 without DeepSpeed."""

    name: str
    processes: int
    nodes: int
    deepspeed: dict[str, Any] | None

    @property
    def world(self) -> int:
        """Processes of the whole run."""
        return self.processes * self.nodes

    @property
    def stage(self) -> int:
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else 0

    @property
    def offload(self) -> bool:
        """Whether the optimizer state is kept in RAM."""
        zero = self.deepspeed["zero_optimization"] if self.deepspeed else {}
        return zero.get("offload_optimizer", {}).get("device", "none") != "none"

    def describe(self) -> str:
        """For the start of a run."""
        nodes = f" on each of {self.nodes} nodes" if self.nodes > 1 else ""
        over = "" if self.world == 1 else f" over {'NCCL' if torch.cuda.is_available() else 'gloo'}"
        return f"{self.name}, {self.processes} process{'es' if self.processes > 1 else ''}{nodes}{over}"


def engine(cfg: DictConfig, here: bool = True) -> Engine:
    """The engine of ``cfg.engine``.

    Args:
        here: whether it will run on this machine, whose GPUs are then counted; else a node has ``slurm.gpus_per_node``.

    Raises:
        ConfigError: numbers that do not work, DeepSpeed missing or without a ZeRO stage.
    """
    node = cfg.engine
    gpus, server = torch.cuda.device_count() if here else gpus_per_node(cfg), cfg.rollout.get("server")
    if here and server is not None and server.launch is True and isinstance(server.gpus, int):
        gpus = max(0, gpus - server.gpus)  # the rest is vLLM's
    processes = node.processes
    if processes is None:
        if not gpus:
            where = "and this machine has no GPU to count" if here else "nor is slurm.gpus_per_node"
            raise ConfigError(f"engine.processes is not set, {where}. Say how many a node: engine.processes=2.")
        processes = gpus
    for key, value in (("processes", processes), ("nodes", node.nodes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"engine.{key}={value} does not work. Expected a whole number of at least 1.")
    if node.name == "single" and processes * node.nodes > 1:
        raise ConfigError(
            f"engine=single is one process, not {processes * node.nodes}. Choose engine=ddp, zero2, zero3 or zero3_offload."
        )
    return Engine(node.name, processes, node.nodes, _deepspeed(node))


def check_gpus(found: Engine) -> None:
    """Raise ConfigError for more processes than this machine has GPUs, where it has any."""
    gpus = torch.cuda.device_count()
    if gpus and found.processes > gpus:
        raise ConfigError(
            f"engine.processes={found.processes}, but this machine has {gpus} GPUs. Expected at most {gpus}."
        )


def _deepspeed(node: DictConfig) -> dict[str, Any] | None:
    if not node.deepspeed:
        return None
    if find_spec("deepspeed") is None:
        raise ConfigError(f'engine={node.name}: DeepSpeed is not installed. Run pip install "entrl[deepspeed]".')
    options = OmegaConf.to_container(node.deepspeed)
    stage = (options.get("zero_optimization") or {}).get("stage")
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.stage={stage} is no stage of ZeRO. Expected 0, 1, 2 or 3."
        )
    return options


def write_deepspeed(folder: Path, found: Engine) -> None:
    """Leave DeepSpeed's configuration in the run folder, where the ranks find it; config.yaml may have been edited since."""
    if found.deepspeed is None:
        return
    path, text = Path(folder) / _DEEPSPEED_FILE, json.dumps(found.deepspeed, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def take_place(environ: MutableMapping[str, str]) -> None:
    """Derive what torch wants to know of a rank from Slurm, where srun started several and nobody else said."""
    tasks = int(
        environ.get("SLURM_STEP_NUM_TASKS", "1")
    )  # only srun sets it; SLURM_NTASKS is there in a batch script too
    if "RANK" in environ or tasks == 1:
        return
    environ |= {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // int(environ.get("SLURM_STEP_NUM_NODES", "1"))),
    }
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))


def enter(folder: Path, found: Engine) -> None:
    """Set up this process as a rank of ``found``; call it before TRL's options are made.

    Raises:
        ConfigError: started in another number of processes than the run was prepared for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found.world:
        raise ConfigError(
            f"{folder} was prepared for {found.world} processes, and {started} were started. Start as many: entrl resume "
            f"{folder}, or torchrun --nnodes {found.nodes} --nproc-per-node {found.processes} -m rl.rank {folder}."
        )
    if found.deepspeed is None:
        return
    write_deepspeed(folder, found)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(Path(folder).absolute() / _DEEPSPEED_FILE)
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true" if found.stage == 3 else "false"
    if found.world == 1:  # DeepSpeed would look for MPI
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # an all-reduce for CPUs that would be compiled first, for minutes; gloo does it as well (deepspeed 0.19)
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


@contextmanager
def whole(wrapped: torch.nn.Module, accelerator: Accelerator) -> Iterator[torch.nn.Module]:
    """The bare model with every weight at hand, also under ZeRO-3; ranks may then use it each in its own way.

    Args:
        wrapped: as the trainer has it. Every rank must enter and leave.
    """
    with _checkpointing_as_it_was(wrapped), unwrap_model_for_generation(wrapped, accelerator) as model:
        if not any(hasattr(p, "ds_id") for p in model.parameters()):
            yield model
            return
        # DeepSpeed 0.19 keeps a hook that compares the ranks' steps at every forward, and TRL 1.16 does not know it
        hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
        for module, *_ in hooks:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield model
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after


@contextmanager
def _checkpointing_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """TRL 1.16 turns activation checkpointing off for a while, and on again without its options."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    held = [(m, name, getattr(m, name)) for m in model.modules() for name in names if hasattr(m, name)]
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
