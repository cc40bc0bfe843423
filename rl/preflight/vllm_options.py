"""What vLLM needs, and what would bias or break sampling with it, found before a run folder is made."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

import torch
from omegaconf import DictConfig
from packaging.requirements import Requirement
from packaging.version import Version
from trl import GRPOConfig

from rl.engine import Engine
from rl.errors import ConfigError
from rl.preflight.report import Section
from rl.server import Server, check_port, server_of, split_gpus


def check_vllm(section: Section, cfg: DictConfig, args: GRPOConfig, engine: Engine, launching: bool) -> None:
    """Note what is wrong with a run that samples from vLLM. Args: launching: this machine is the one that starts it."""
    if not args.use_vllm:
        return
    section.attempt(check_probabilities, args)
    server = section.attempt(server_of, cfg)
    if args.vllm_mode == "colocate":
        section.attempt(check_parallelism, args, engine.world)
    if not launching or find_spec("vllm") is None:  # that it is missing has been noted
        return
    section.attempt(check_version)
    if not torch.cuda.is_available():
        section.error("rollout.backend=vllm needs a GPU that was not found. Use rollout=hf or native.")
    elif server is not None and server.launch:
        section.attempt(check_place, server, engine.processes)


def check_probabilities(args: GRPOConfig) -> None:
    """Raise ConfigError where vLLM samples from other probabilities than those that TRL divides by.

    vLLM's logps are those after truncation and penalty, the trainer's are those of the whole distribution, so the importance
    ratio of every token would be wrong by the share that was cut.
    """
    cut = {
        "top_p": args.top_p < 1,
        "top_k": bool(args.top_k),
        "min_p": bool(args.min_p),
        "repetition_penalty": args.repetition_penalty != 1,
    }
    extra = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    found = [name for name, on in cut.items() if on or name in extra]
    if found and args.vllm_importance_sampling_correction:
        raise ConfigError(
            f"trainer.{found[0]} changes what vLLM samples from but not the probabilities that TRL's importance correction divides "
            f"by, which biases the gradient. Leave {', '.join(found)} off, or set trainer.vllm_importance_sampling_correction=false."
        )


def check_parallelism(args: GRPOConfig, processes: int) -> None:
    """Raise ConfigError where the processes cannot be grouped into copies of the model."""
    size = args.vllm_tensor_parallel_size
    if processes % size:
        raise ConfigError(
            f"trainer.vllm_tensor_parallel_size={size} does not divide the {processes} process{'' if processes == 1 else 'es'} "
            "of the training, which vLLM shares. Lower it, or use rollout=vllm_server."
        )


def check_version() -> None:
    """Raise ConfigError for a vLLM outside the versions that entrl and TRL were made for."""
    installed = Version(metadata.version("vllm"))
    needed = next(r for r in map(Requirement, metadata.requires("entrl") or []) if r.name == "vllm")
    # a build such as 0.24.0+cu129 is that version, not a later one
    if not needed.specifier.contains(Version(installed.base_version), prereleases=True):
        raise ConfigError(
            f'vLLM {installed} is installed; TRL works with vllm{needed.specifier}. Run pip install "vllm{needed.specifier}".'
        )


def check_place(server: Server, processes: int) -> None:
    """Raise ConfigError where a server that is to be launched would find no GPU or no port."""
    training, _ = split_gpus(server.gpus)
    if processes > len(training):
        raise ConfigError(
            f"engine.processes={processes} and rollout.server.gpus={server.gpus} need {processes + server.gpus} GPUs, "
            f"{len(training) + server.gpus} can be seen. Lower one of them."
        )
    check_port(server)
