"""The configuration by itself: does it compose, can everything it names be made, do the numbers fit each other?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from trl import GRPOConfig

from rl import build, rundir
from rl.config import compose, gate_order, reward_gates
from rl.engine import check_gpus, engine
from rl.errors import ConfigError, MissingError
from rl.eval_run import check_engine
from rl.groups import run_facts, trained_of_group
from rl.options import batch_algebra, check_generation, check_optimizer, trainer_flaws
from rl.paths import find_model
from rl.pipeline import Pipeline
from rl.preflight.loading import check_quantization
from rl.preflight.report import Section
from rl.preflight.vllm_options import check_vllm
from rl.scoring import sharded
from rl.testing import batch_from_logits, rollout_of
from rl.tracking import resolve_mode


def compose_what_can_be(overrides: Sequence[str], config_dir: str | None, section: Section) -> DictConfig:
    """The configuration without the overrides that cannot be composed, each of which is noted.

    Raises:
        ConfigError: not even the default composes.
    """
    left = list(overrides)
    while True:
        try:
            return compose(left, config_dir)
        except MissingError as error:
            section.error(str(error))
            left.append(f"{error.key}=missing")
        except ConfigError:
            if not left:
                raise
            del left[_first_wrong(left, config_dir, section)]


def _first_wrong(overrides: Sequence[str], config_dir: str | None, section: Section) -> int:
    for end in range(1, len(overrides) + 1):
        try:
            compose(overrides[:end], config_dir)
        except MissingError:
            continue  # its value may come later on the line
        except ConfigError as error:
            section.error(str(error))
            return end - 1
    raise AssertionError("overrides that compose one after the other do not compose together")


def world(cfg: DictConfig, here: bool = True) -> int:
    """Processes of the run; 1 while nobody can tell, which is an error of its own. Args: here: it will be on this machine."""
    try:
        return engine(cfg, here).world
    except ConfigError:
        return 1


def check_settings(
    cfg: DictConfig, section: Section, new: bool = True, here: bool = True
) -> tuple[Pipeline | None, GRPOConfig | None]:
    """Everything that is made from ``cfg`` without data or weights; what could be made is returned.

    Args:
        new: the run folder must not be there yet. here: the run will be on this machine.
    """
    found = section.attempt(engine, cfg, here)
    if found is not None and new and here:  # srun may show a rank its own GPU only
        section.attempt(check_gpus, found)
    plugins = {name: section.attempt(build.plugin, name, node) for name, node in cfg.plugin.items()}
    good = {name: plugin for name, plugin in plugins.items() if plugin is not None}
    pipeline = section.attempt(build.pipeline_of, cfg, good)
    if found is not None and found.stage == 3 and pipeline is not None:
        for need in sorted({"full_kl", "logit_scale"} & pipeline.needs):
            section.error(str(sharded("ZeRO-3", pipeline.asking(need), need)))
    flaws = list(trainer_flaws(cfg.trainer))
    for flaw in flaws:
        section.error(flaw)
    if not flaws:  # the numbers are numbers
        section.attempt(batch_algebra, cfg.trainer, world(cfg, here))
    _check_rewards(cfg, section)
    section.attempt(build.decoding, cfg)
    section.attempt(check_engine, cfg, True)
    section.attempt(resolve_mode, cfg.logger.mode)
    section.attempt(build.check_dtype, cfg.model)
    section.attempt(build.peft_config, cfg)
    section.attempt(build.quantization, cfg.model)
    section.attempt(check_quantization, cfg)
    section.attempt(build.use_threads, cfg.engine.threads)
    section.attempt(build.checkpoints, cfg, Path(cfg.run.dir))
    section.attempt(build.watches, cfg)
    _check_kinds(cfg, section)
    if new and isinstance(cfg.run.name, str):
        section.attempt(rundir.check_free, Path(cfg.run.dir), cfg.run.name, cfg.run.overwrite)
    for half in ("bf16", "fp16"):
        if here and cfg.trainer.get(half) and not torch.cuda.is_available():
            section.error(
                f"trainer.{half}=true needs a GPU that was not found. Leave bf16 null: on with a GPU, off without."
            )
    if cfg.trainer.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        section.error(
            "trainer.use_liger_kernel=true: liger-kernel is not installed. Run pip install liger-kernel, or leave it false."
        )
    if section.errors or found is None:
        return pipeline, None
    args = section.attempt(build.grpo_config, cfg, str(Path(cfg.run.dir) / "unused"), _weights(cfg), world(cfg, here))
    if args is not None:
        section.attempt(build.check_backend, cfg.rollout.backend, args, here)
        check_vllm(section, cfg, args, found, launching=new and here)
        section.attempt(check_optimizer, args)
        if not args.use_vllm:
            section.attempt(check_generation, args)
        section.attempt(trained_of_group, cfg.rollout.train_share, args)
    return pipeline, args


_FLAGS = ("dry_run", "run.overwrite", "eval.before", "eval.after", "eval.greedy")
_LEAST = {"record.every": 0, "record.max_rows": 1, "record.show": 0, "record.alternatives": 0, "record.probes": 0}


def _check_kinds(cfg: DictConfig, section: Section) -> None:
    """Values that nothing is made from, so that a wrong kind would show late or never."""
    for key, least in _LEAST.items():
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            section.error(f"{key}={value} does not work. Expected a whole number of at least {least}.")
    for key in _FLAGS:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            section.error(f"{key}={value} is neither true nor false.")
    for key in ("logger.init_timeout", "logger.finish_timeout"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            section.error(f"{key}={value} does not work. Expected seconds above 0.")
    for key in (
        ("seed", "eval.seed")
        if cfg.trainer.get("seed", cfg.seed) == cfg.seed
        else ("seed", "eval.seed", "trainer.seed")
    ):
        section.attempt(build.check_seed, key, OmegaConf.select(cfg, key))
    for key in ("run.dir", "run.name", "model.path"):
        value = OmegaConf.select(cfg, key)
        if not (isinstance(value, str) and value.strip()) and not (key == "run.name" and value is None):
            section.error(
                f"{key}={value} is no text. Expected some, in quotes where it looks like a number: '{key}=\"{value}\"'."
            )


def _check_rewards(cfg: DictConfig, section: Section) -> None:
    if not cfg.reward:
        section.attempt(build.rewards, cfg)
        return
    gates = section.attempt(reward_gates, cfg.reward)
    if gates is not None:
        section.attempt(gate_order, gates)
        if not any(_weights(cfg)):
            section.error(
                "Every reward has weight 0, so there is nothing to learn. Set reward.<name>.weight of one of them."
            )
    for name, node in cfg.reward.items():
        section.attempt(build.make, f"reward.{name}.fn", node.fn)


def _weights(cfg: DictConfig) -> list[float]:
    return [float(node.weight) for node in cfg.reward.values()]


def check_batch(cfg: DictConfig, section: Section, pipeline: Pipeline | None, args: GRPOConfig | None) -> None:
    """The batch algebra as a table, and what it means for the plug-ins."""
    algebra = batch_algebra(cfg.trainer, world(cfg))
    for line in algebra.table(cfg.trainer.max_completion_length):
        section.fact(line)
    per_rollout, per_update = algebra.steps_per_generation, algebra.accumulation
    if max(per_rollout, per_update) % min(per_rollout, per_update):
        section.error(
            f"trainer.steps_per_generation={per_rollout} and trainer.gradient_accumulation_steps={per_update} do not divide each "
            "other: an update would mix two rollouts. Make one a multiple of the other."
        )
    if pipeline is None or args is None:
        return
    for advice in pipeline.check(run_facts(args, world(cfg))):
        section.advise(advice)


def check_plugins(section: Section, pipeline: Pipeline, on_policy: bool) -> None:
    """A synthetic batch through every plug-in: one that touches no token there will hardly touch any in a run."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, width, vocabulary = 16, 48, 64
    spread = torch.rand(rows, width, 1, generator=generator) * 8  # from nearly uniform to nearly certain
    logits = random(rows, width, vocabulary) * spread
    ids = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(rows, width)
    lengths = torch.randint(8, width + 1, (rows, 1), generator=generator)
    tokens = batch_from_logits(
        logits.requires_grad_(),
        ids,
        torch.arange(width) < lengths,
        random(rows),
        old_logits=None if on_policy else logits.detach() + 0.3 * random(*logits.shape),
        ref_logits=logits.detach() + 0.1 * random(*logits.shape),
        reward=(random(rows) > 0).float(),
        group=torch.arange(rows) // 8,
        total_steps=100,
    )
    tokens = replace(tokens, noted=pipeline.at_rollout(rollout_of(tokens, group_size=8)))
    metrics = pipeline(tokens).metrics
    for name in [*pipeline.plugins, *pipeline.shadows]:
        total, count = metrics[f"plugin/{name}/touched"]
        share = float(total / count)
        what = name if name in pipeline.plugins else f"the shadow {name}"
        section.fact(f"{what} touches {share:.0%} of the tokens of a synthetic batch")
        if share == 0:
            section.advise(
                f"plugin.{name} touches no token of a synthetic {'on' if on_policy else 'off'}-policy batch: are its settings neutral?"
            )


def model_path(cfg: DictConfig, section: Section) -> tuple[str | None, Any]:
    """Where the model is and its tokenizer, None for what cannot be had."""
    path = section.attempt(find_model, cfg.model.path) if isinstance(cfg.model.path, str) else None
    return path, None if path is None else section.attempt(build.tokenizer, path, cfg.model)
