"""The ``trainer`` keys: what the installed TRL knows of them, and what the batch sizes amount to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

import torch
from accelerate.utils import DynamoBackend
from omegaconf import DictConfig
from transformers import GenerationConfig, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rl.config import did_you_mean
from rl.errors import ConfigError

if TYPE_CHECKING:
    from trl import GRPOConfig


def check_trainer_options(trainer: DictConfig) -> None:
    """Raise ConfigError with everything that is wrong with ``trainer``."""
    if flaws := list(trainer_flaws(trainer)):
        raise ConfigError("\n".join(flaws))


def trainer_flaws(trainer: DictConfig) -> Iterator[str]:
    """What is wrong with ``trainer``, a sentence each: every key must be an option of the installed ``trl.GRPOConfig``, of its kind.

    TRL itself notices some wrong values only at the first loss, after a rollout. Imports TRL.
    """
    from trl import GRPOConfig

    known = {f.name: _kinds(f.type) for f in fields(GRPOConfig) if f.init}
    for key, value in trainer.items():
        if key not in known:
            yield f"trainer.{key} is no option of trl.GRPOConfig.{did_you_mean(str(key), list(known))}"
        elif key in _OURS:
            yield f"trainer.{key} is set by entrl itself: {_OURS[key]}."
        elif flaw := _flaw(key, value, known[key]):
            yield f"trainer.{key}={value} {flaw}"
    for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
        if trainer.get(key) and not trainer.get("dataloader_num_workers"):
            yield f"trainer.{key}={trainer[key]} needs workers. Set trainer.dataloader_num_workers=1 or more."
    if trainer.get("sync_ref_model") and not trainer.get("beta"):
        yield "trainer.sync_ref_model=true needs a reference model. Set trainer.beta above 0, or leave it false."


def _kinds(annotation: Any) -> set[type]:
    return set(get_args(annotation) or (annotation,))


def _flaw(key: str, value: Any, kinds: set[type]) -> str | None:
    """What is wrong with a value, as the end of a sentence."""
    if value is None:
        optional = NoneType in kinds and key not in _NEEDED or key in _AUTOMATIC
        return None if optional else f"does not work. Expected {'a text' if str in kinds else 'a number'}."
    if key in _CHOICES or key in _ENUMS:
        allowed = _CHOICES.get(key) or [str(member.value).lower() for member in _ENUMS[key]]
        return None if value in allowed else f"is not known. Expected one of: {', '.join(map(str, allowed))}."
    if dict in kinds and not isinstance(value, Mapping):
        return "is no map. Expected one, as {key: value}."
    if str in kinds and not kinds & {int, float, bool} and isinstance(value, int | float):
        return f"is a {type(value).__name__}. Expected a text."
    if not kinds <= {int, float, bool, NoneType}:
        return None
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, int | float):
        wanted = "true or false" if bool in kinds else "a number"
        return f"is a {type(value).__name__}. Expected {wanted}."
    if float not in kinds and isinstance(value, float):
        return "does not work. Expected a whole number."
    text, fits = next(((t, rule) for t, rule, keys in _RULES if key in keys), ("a number", lambda x: True))
    finite = math.isfinite(value) or (key in _MAY_BE_INFINITE and value == math.inf)
    return None if finite and fits(value) else f"does not work. Expected {text}."


# Options that the batch sizes are made of, which TRL would fill in by itself; and those that entrl fills in.
_NEEDED = ("steps_per_generation", "num_generations", "max_completion_length")
_AUTOMATIC = ("use_cpu",)
_MAY_BE_INFINITE = ("max_grad_norm",)  # never clips

_ENUMS = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType, "torch_compile_backend": DynamoBackend}

_CHOICES = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

# What is expected, the rule, and the options it holds for; of the others only that they are finite.
_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "a number above 0",
        lambda x: x > 0,
        (
            "learning_rate", "adam_epsilon", "max_steps", "temperature", "max_completion_length", "epsilon", "epsilon_high", "delta",
            "num_iterations", "logging_steps", "save_steps", "save_total_limit", "num_train_epochs", "repetition_penalty",
            "generation_batch_size", "sapo_temperature_neg", "sapo_temperature_pos", "ref_model_sync_steps",
            "vllm_importance_sampling_clip_max", "vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_server_timeout",
            "off_policy_mask_threshold", "ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps",
            "dataloader_prefetch_factor", "num_completions_to_print",
        ),
    ),
    (
        "a number of at least 0",
        lambda x: x >= 0,
        (
            "weight_decay", "warmup_steps", "max_grad_norm", "beta", "top_k", "neftune_noise_alpha",
            "vllm_importance_sampling_clip_min", "dataloader_num_workers", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
            "vespo_lambda_neg", "entropy_target", "entropy_coef_delta", "router_aux_loss_coef", "data_seed",
        ),
    ),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
    ("0 to 1", lambda x: 0 <= x <= 1, ("min_p", "ref_model_mixup_alpha")),
    ("0 < top_p <= 1; 1 is off", lambda x: 0 < x <= 1, ("top_p",)),
    ("a share above 0 and below 1", lambda x: 0 < x < 1, ("vllm_gpu_memory_utilization",)),
    ("a port from 1 to 65535", lambda x: 0 < x < 65536, ("vllm_server_port", "vllm_group_port")),
)  # fmt: skip

# TRL options that would double or break what entrl does.
_OURS = {
    "output_dir": "the run folder decides it; use run.dir and run.name",
    "report_to": "use logger=; TRL's own reports would count W&B steps wrongly",
    "top_entropy_quantile": "use plugin=[fork_mask] plugin.fork_mask.rho=",
    "run_name": "use run.name",
    "save_strategy": "use checkpoint.every",
    "save_steps": "use checkpoint.every",
    "save_total_limit": "use checkpoint.keep_last",
    "save_only_model": "a checkpoint is what a run resumes from",
    "deepspeed": "use engine=zero2, zero3 or zero3_offload, and engine.deepspeed",
    "disable_tqdm": "the progress line takes its place",
    "gradient_checkpointing": "use its new name, trainer.activation_checkpointing",
    "gradient_checkpointing_kwargs": "use its new name, trainer.activation_checkpointing_kwargs",
    "reward_weights": "use reward.NAME.weight",
    "remove_unused_columns": "rewards get all columns of the data",
    "dataloader_pin_memory": "on with a GPU",
    "model_init_kwargs": "use model.dtype, model.attn_implementation and model.quantization",
    "trust_remote_code": "use model.trust_remote_code",
    "eval_strategy": "use eval.before and eval.after",
    "eval_on_start": "use eval.before",
    "load_best_model_at_end": "the last weights are saved",
    "metric_for_best_model": "the last weights are saved",
    "parallelism_config": "use engine=",
    "auto_find_batch_size": "it would change what an update means; entrl doctor says what fits",
}


def check_optimizer(args: GRPOConfig) -> None:
    """Make the optimizer and the schedule as the trainer will, on one number.

    Raises:
        ConfigError: a package is missing, or an option that they refuse.
    """
    from transformers import Trainer

    number = torch.nn.Parameter(torch.zeros(1))
    with _refusal("optim", args.optim, "optim_args"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.ParameterList([number]))
        optimizer = kind([number], **options)
    with _refusal("lr_scheduler_type", args.lr_scheduler_type, "lr_scheduler_kwargs"):
        get_scheduler(args.lr_scheduler_type, optimizer, 0, args.max_steps, args.lr_scheduler_kwargs)


def check_generation(args: GRPOConfig) -> None:
    """Raise ConfigError for what transformers' generate does not take."""
    options = dict(args.generation_kwargs or {})
    with _refusal("generation_kwargs", options, "cache_implementation"):
        config = GenerationConfig(cache_implementation=args.cache_implementation)
        unknown = config.update(**options)
        config.validate()
    if unknown:
        raise ConfigError(
            f"trainer.generation_kwargs.{next(iter(unknown))} is no option of transformers.GenerationConfig."
            f"{did_you_mean(next(iter(unknown)), list(config.to_dict()))}"
        )


@contextmanager
def _refusal(key: str, value: Any, options: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each optimizer and schedule refuses in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"trainer.{key}={getattr(value, 'value', value)} cannot be made: {reason}. Check it and trainer.{options}."
        ) from error


@dataclass(frozen=True)
class BatchAlgebra:
    """What the batch-size options of TRL amount to."""

    micro_batch: int
    accumulation: int
    world: int
    steps_per_generation: int
    iterations: int
    group: int

    @property
    def completions_per_rollout(self) -> int:
        return self.micro_batch * self.world * self.steps_per_generation

    @property
    def completions_per_update(self) -> int:
        return self.micro_batch * self.world * self.accumulation

    @property
    def group_on_a_rank(self) -> int:
        """Completions of one prompt that a reward gets in one call: the group, or its smallest part where ranks share one."""
        return self.micro_batch * self.steps_per_generation % self.group or self.group

    @property
    def prompts_per_rollout(self) -> int:
        return self.completions_per_rollout // self.group

    @property
    def on_policy(self) -> bool:
        """No update happens between a rollout and its last use."""
        return self.accumulation % (self.steps_per_generation * self.iterations) == 0

    def __str__(self) -> str:
        return (
            f"{self.completions_per_rollout} completions a rollout = {self.micro_batch} per device x {self.world} devices "
            f"x {self.steps_per_generation} steps_per_generation, in groups of {self.group}"
        )

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps from one rollout; below 1 where several rollouts make one step."""
        return self.completions_per_rollout * self.iterations / self.completions_per_update

    def describe(self) -> str:
        """For the start of a run."""
        updates = self.updates_per_rollout
        policy = "on-policy" if self.on_policy else "off-policy (clipping and old-policy entropies matter)"
        return (
            f"{self.prompts_per_rollout} prompts x {self.group} completions a rollout, "
            f"{updates:g} update{'' if updates == 1 else 's'} from it, {policy}"
        )

    def table(self, completion_tokens: int) -> list[str]:
        """The algebra in words, a line each; ``completion_tokens``: at most, of one completion."""
        n = self.completions_per_update
        rows = {
            "prompts an update": f"{n // self.group:,}" if n % self.group == 0 else f"{n / self.group:.3g}",
            "completions an update": f"{n:,} = {self.micro_batch} a forward x {self.accumulation} accumulated x {self.world} devices",
            "completions a rollout": f"{self.completions_per_rollout:,} in groups of {self.group}",
            "updates from a rollout": f"{self.updates_per_rollout:g}",
            "tokens an update": f"up to {n * completion_tokens:,}",
            "on-policy": "yes: ratios are 1, nothing is clipped"
            if self.on_policy
            else "no: clipping and old-policy entropies matter",
        }
        return [f"{name:<24}{value}" for name, value in rows.items()]


def batch_algebra(trainer: DictConfig, world: int) -> BatchAlgebra:
    """The algebra of these options.

    Raises:
        ConfigError: groups do not fit into the generation batch, or a group of one.
    """
    algebra = BatchAlgebra(
        trainer.per_device_train_batch_size,
        trainer.gradient_accumulation_steps,
        world,
        trainer.steps_per_generation,
        trainer.num_iterations,
        trainer.num_generations,
    )
    sizes = (algebra.micro_batch, algebra.accumulation, algebra.steps_per_generation, algebra.iterations)
    if min(sizes) < 1:
        raise ConfigError(f"trainer has a batch size below 1: {algebra}.")
    if algebra.group < 2:
        raise ConfigError(f"trainer.num_generations={algebra.group} leaves nothing to compare. Expected at least 2.")
    if algebra.completions_per_rollout % algebra.group:
        raise ConfigError(
            f"{algebra}: {algebra.completions_per_rollout} is not a multiple of {algebra.group}. "
            "Change trainer.per_device_train_batch_size, trainer.steps_per_generation or trainer.num_generations."
        )
    return algebra
