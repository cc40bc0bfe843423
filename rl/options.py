"""The ``trainer`` keys: what the installed TRL knows of them, and what the batch sizes amount to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from omegaconf import DictConfig

from rl.config import did_you_mean
from rl.errors import ConfigError


def check_trainer_options(trainer: DictConfig) -> None:
    """Raise ConfigError with everything that is wrong with ``trainer``."""
    if flaws := list(trainer_flaws(trainer)):
        raise ConfigError("\n".join(flaws))


def trainer_flaws(trainer: DictConfig) -> Iterator[str]:
    """What is wrong with ``trainer``, a sentence each: every key must be an option of the installed ``trl.GRPOConfig``, of its kind.

    TRL itself notices some wrong values only at the first loss, after a rollout. Imports TRL.
    """
    from trl import GRPOConfig

    known = {f.name: f.default for f in fields(GRPOConfig) if f.init}
    for key, value in trainer.items():
        if key not in known:
            yield f"trainer.{key} is no option of trl.GRPOConfig.{did_you_mean(str(key), list(known))}"
        elif isinstance(known[key], int | float) and value is not None and not isinstance(value, int | float):
            yield f"trainer.{key}={value} is a {type(value).__name__}. Expected a number or a truth value."
        elif _is_whole(known[key]) and isinstance(value, float):
            yield f"trainer.{key}={value} does not work. Expected a whole number."
        elif key == "top_p" and not 0 < value <= 1:
            yield f"trainer.top_p={value} does not work. Expected 0 < top_p <= 1; 1 is off."
        elif key in _POSITIVE and not (isinstance(value, int | float) and value > 0):
            yield f"trainer.{key}={value} does not work. Expected a number above 0."
        elif key in _CHOICES and value not in _CHOICES[key]:
            yield f"trainer.{key}={value} is not known. Expected one of: {', '.join(_CHOICES[key])}."
        elif key in _OURS:
            yield f"trainer.{key} is set by entrl itself: {_OURS[key]}."


def _is_whole(default: object) -> bool:
    return isinstance(default, int) and not isinstance(default, bool)


_CHOICES = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}

_POSITIVE = (
    "learning_rate",
    "max_steps",
    "temperature",
    "max_completion_length",
    "epsilon",
    "num_iterations",
    "logging_steps",
)

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
}


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
