"""From a resolved configuration to objects. Config reaches code by construction only: here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import GRPOConfig

from data.errors import DataError
from rewards.checked import Checked
from rewards.errors import RewardError
from rewards.gate import Gated, Once
from rl.alarms import Watch
from rl.checkpoint import Checkpoints
from rl.config import did_you_mean, gate_order, reward_gates
from rl.contract import TokenPlugin
from rl.draw import Decoding
from rl.errors import CheckpointError, ConfigError, EntrlError
from rl.evaluate import check_ks
from rl.options import check_trainer_options
from rl.pipeline import Pipeline
from rl.rollout import NativeSampler
from rl.shadows import shadow_plugins

_BACKENDS = ("hf", "native", "vllm")
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def make(key: str, node: Any) -> Any:
    """Instantiate a ``_target_`` node; what goes wrong names the key.

    Raises:
        ConfigError: nothing importable, an argument it does not take, or a value it refuses.
    """
    try:
        made = instantiate(node, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, EntrlError | DataError | RewardError):
            raise cause from error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        where = node.get("_target_", "") if hasattr(node, "get") else ""
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise ConfigError(f"{key}: {where} cannot be made: {reason}. Check its _target_ and its arguments.") from error
    if isinstance(made, partial):
        _check_names(key, made)
    return made


def _check_names(key: str, made: partial) -> None:
    """A reward takes ``**columns``, so a misspelt option of it would vanish there without a word."""
    known = [n for n, p in signature(made.func).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if unknown := [name for name in made.keywords if name not in known]:
        raise ConfigError(
            f"{key}.{unknown[0]} is no parameter of {made.func.__module__}.{made.func.__qualname__}."
            f"{did_you_mean(unknown[0], known)} Expected one of: {', '.join(known)}."
        )


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads, None for its default.

    Raises:
        ConfigError: no number of threads.
    """
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ConfigError(f"engine.threads={threads} does not work. Expected a number above 0, or null.")
    torch.set_num_threads(threads)


def check_seed(key: str, value: Any) -> None:
    """Raise ConfigError for what is no seed of numpy and torch."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{key}={value} is no seed. Expected a whole number from 0 to {2**32 - 1}.")


def plugin(name: str, node: DictConfig) -> TokenPlugin:
    """One plug-in, from all of its keys but ``shadow``, which is not its own.

    Raises:
        ConfigError: it cannot be made, or ``shadow`` is no truth value.
    """
    if not isinstance(node.get("shadow", False), bool):
        raise ConfigError(f"plugin.{name}.shadow={node.shadow} is neither true nor false.")
    return make(f"plugin.{name}", OmegaConf.masked_copy(node, [key for key in node if key != "shadow"]))


def pipeline(cfg: DictConfig) -> Pipeline:
    """The selected plug-ins in order, shadows apart."""
    return pipeline_of(cfg, {name: plugin(name, node) for name, node in cfg.plugin.items()})


def pipeline_of(cfg: DictConfig, made: Mapping[str, TokenPlugin]) -> Pipeline:
    """The pipeline of plug-ins that were ``made`` of ``cfg``, by name."""
    shadows = {name: made[name] for name in shadow_plugins(cfg) if name in made}
    return Pipeline({name: p for name, p in made.items() if name not in shadows}, shadows)


def tokenizer(path: str, model: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end of text."""
    found = pretrained(AutoTokenizer, path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def language_model(path: str, model: DictConfig) -> PreTrainedModel:
    """The weights of a model, on the GPU when there is one; linear layers but the head in 4 bits where it says so."""
    check_dtype(model)
    quantized = quantization(model)
    dtype = model.dtype if torch.cuda.is_available() else "float32"  # bf16 on a CPU is slow and inexact
    found = pretrained(
        AutoModelForCausalLM,
        path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        **({} if quantized is None else {"quantization_config": quantized}),
    )
    if quantized is not None:  # its weights are where they belong already
        return _without_packing(found)
    parted = any(hasattr(p, "ds_id") for p in found.parameters())  # by ZeRO-3, on the GPU already
    return found.to("cuda") if torch.cuda.is_available() and not parted else found


def _without_packing(model: PreTrainedModel) -> PreTrainedModel:
    """bitsandbytes 0.50 repacks weights at the first sampling on CPUs with AVX512-BF16; from then on they pass no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantization(model: DictConfig) -> BitsAndBytesConfig | None:
    """How weights are quantised as they are loaded, None for not at all.

    Raises:
        ConfigError: bitsandbytes is missing, or options it does not have.
    """
    if model.quantization is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            'model.quantization (peft=qlora) needs bitsandbytes. Run pip install "entrl[qlora]", or use peft=lora.'
        )
    return make("model.quantization", model.quantization)


def check_dtype(model: DictConfig) -> None:
    """Raise ConfigError for a dtype that no model is loaded in."""
    if model.dtype not in _DTYPES:
        raise ConfigError(f"model.dtype={model.dtype} is not known. Expected one of: {', '.join(_DTYPES)}.")


def pretrained(cls: type, path: str, **options: Any) -> Any:
    """``cls.from_pretrained``; what goes wrong there is a CheckpointError that names ``model.path``."""
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"model.path={path} could not be loaded: {reason}. Check the id or folder, and the network for a hub model."
        ) from error


def rewards(cfg: DictConfig) -> tuple[list[Checked | Once | Gated], list[float]]:
    """Reward functions, each checked at every call, and their weights.

    Raises:
        ConfigError: no reward, a gate that is no other selected reward, or a value that does not work.
    """
    if not cfg.reward:
        raise ConfigError("reward=[] leaves nothing to learn. Expected at least one, as reward=[correct].")
    gates = reward_gates(cfg.reward)
    is_gate = {gate for gate, _ in gates.values()}
    built: dict[str, Checked | Once | Gated] = {}
    for name in gate_order(gates):
        gate, least = gates[name]
        found = Checked(name, make(f"reward.{name}.fn", cfg.reward[name].fn))
        found = found if gate is None else Gated(found, built[gate], least)
        built[name] = Once(found) if name in is_gate else found
    return [built[name] for name in cfg.reward], [float(node.weight) for node in cfg.reward.values()]


class _Planned(GRPOConfig):
    """The options of a run that other processes than this one will do."""

    @property
    def world_size(self) -> int:
        return self._world


def grpo_config(cfg: DictConfig, output_dir: str, weights: list[float], world: int = 1) -> GRPOConfig:
    """TRL's options for this machine; entrl reports by itself, so TRL's reports are off.

    Args:
        world: processes of the run, of which this is one or the one that starts them.

    Raises:
        ConfigError: an unknown option or a value TRL refuses.
    """
    check_trainer_options(cfg.trainer)
    options = OmegaConf.to_container(cfg.trainer)
    gpu = torch.cuda.is_available()
    # accelerate takes use_cpu as a wish for no DeepSpeed
    for name, value in {"bf16": gpu, "use_cpu": not gpu and not cfg.engine.deepspeed}.items():
        if options[name] is None:
            options[name] = value
    # DDP would search the graph at every step; every parameter gets a gradient on every rank, be it zero
    options.setdefault("ddp_find_unused_parameters", False)
    kind = GRPOConfig
    if "RANK" not in os.environ:
        if world > 1:
            kind = type("_Planned", (_Planned,), {"_world": world})
    elif not gpu:
        options.setdefault("ddp_backend", "gloo")
    if host := os.environ.get("ENTRL_VLLM_HOST"):  # where a job script started the server: known only once the job runs
        options["vllm_server_host"] = host
    try:
        made = kind(
            output_dir=output_dir,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=gpu,
            reward_weights=weights,
            remove_unused_columns=False,
            save_strategy="no",  # checkpoint.every decides
            **options,
        )
    except Exception as error:  # an odd value may break anything in there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"trainer: TRL refuses these options: {reason}") from error
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process has one GPU; transformers would take all it sees by torch's DataParallel
    return made


def check_backend(backend: str, args: GRPOConfig, here: bool = True) -> None:
    """Raise ConfigError for a backend that is unknown, contradicts TRL's options or, where the run will be here, is not installed."""
    if backend not in _BACKENDS:
        raise ConfigError(f"rollout.backend={backend} is not known. Expected one of: {', '.join(_BACKENDS)}.")
    if (backend == "vllm") != args.use_vllm:
        raise ConfigError(
            f"rollout.backend={backend} and trainer.use_vllm={args.use_vllm} contradict each other. "
            "Choose with rollout=hf, native, vllm_colocate or vllm_server."
        )
    if here and backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            'rollout.backend=vllm: vLLM is not installed. Run pip install "entrl[vllm]", or use rollout=hf.'
        )


def sampler(cfg: DictConfig, model: PreTrainedModel, args: GRPOConfig, pipeline: Pipeline) -> NativeSampler | None:
    """What draws the completions; None leaves it to TRL.

    Raises:
        ConfigError: an unknown backend, vLLM missing, or a model or an option that the native one does not know.
    """
    backend = cfg.rollout.backend
    check_backend(backend, args)
    return NativeSampler(model.config, args, rank="rank" in pipeline.needs) if backend == "native" else None


def peft_config(cfg: DictConfig) -> Any:
    """The adapters to train, None for full fine-tuning."""
    if not cfg.peft:
        return None
    return make("peft", cfg.peft)


def checkpoints(cfg: DictConfig, folder: Path) -> Checkpoints:
    """Where and when a run is saved.

    Raises:
        ConfigError: a number that does not work.
    """
    c = cfg.checkpoint
    return Checkpoints(folder, every=c.every, keep_last=c.keep_last, keep_every=c.keep_every)


def watches(cfg: DictConfig) -> dict[str, Watch]:
    """What the alarms look at, by their names; those that are null are off, and a run from before there were any has none.

    Raises:
        ConfigError: an action that does not exist, or a threshold that makes no sense.
    """
    found = {}
    for name, node in (cfg.get("alarm") or {}).items():
        if node is None:
            continue
        if not (isinstance(node, DictConfig) and "_target_" in node):
            raise ConfigError(f"alarm.{name}={node} is no alarm. Expected a _target_ with its arguments, or null.")
        try:
            made = make(f"alarm.{name}", node)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith("alarm.") else f"alarm.{name}.{text}") from error
        if not isinstance(made, Watch):
            raise ConfigError(f"alarm.{name} is no alarm: {node._target_} does not derive from rl.alarms.Watch.")
        found[name] = made
    return found


def decoding(cfg: DictConfig) -> Decoding:
    """How evaluation samples.

    Raises:
        ConfigError: a k above the number of samples, several equal (greedy) samples, or a value out of range.
    """
    e = cfg.eval
    check_ks(e.ks, e.samples)
    if e.temperature == 0 and e.samples > 1:
        raise ConfigError(
            f"eval.temperature=0 is greedy, so eval.samples={e.samples} would be the same completion {e.samples} times. "
            "Set eval.samples=1 'eval.ks=[1]' eval.greedy=false, or raise eval.temperature."
        )
    if e.limit is not None and (not isinstance(e.limit, int) or isinstance(e.limit, bool) or e.limit < 1):
        raise ConfigError(f"eval.limit={e.limit} does not work. Expected a number of problems of at least 1, or null.")
    names = [field.name for field in fields(Decoding)]
    return Decoding(**{name: e[name] for name in names})
