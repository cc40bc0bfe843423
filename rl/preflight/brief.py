"""What every training starts with: everything that would stop it later, found before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from rl import build
from rl.errors import ConfigError
from rl.options import BatchAlgebra, batch_algebra
from rl.pipeline import Pipeline
from rl.preflight import settings, tasks
from rl.preflight.doctor import check_memory, context_of, model_config
from rl.preflight.loading import check_model
from rl.preflight.probe import probe_rewards
from rl.preflight.report import Section
from rl.problems import Problems


class Ready(NamedTuple):
    """What a run is made of, up to its weights."""

    pipeline: Pipeline
    args: GRPOConfig
    algebra: BatchAlgebra
    path: str
    tokenizer: PreTrainedTokenizerBase
    problems: Problems
    rewards: list[Callable[..., Any]]
    advice: list[str]


def settings_only(cfg: DictConfig) -> None:
    """What can be told without the machine the run will be on, without data and weights.

    Raises:
        ConfigError: all that stops the run, a line each.
    """
    section = Section("before training")
    settings.check_settings(cfg, section, here=False)
    _raise(section)


def before_training(cfg: DictConfig, new: bool = True) -> Ready:
    """Make everything but the model.

    Args:
        new: the run folder must not be there yet.

    Raises:
        ConfigError: all that stops the run, a line each.
    """
    section = Section("before training")
    pipeline, args = settings.check_settings(cfg, section, new)
    algebra = None if args is None else batch_algebra(cfg.trainer, settings.world(cfg))
    if algebra is not None:
        settings.check_batch(cfg, section, pipeline, args)
    path, tokenizer = settings.model_path(cfg, section)
    config = None if path is None else section.attempt(model_config, path, cfg)
    if config is not None:
        check_model(cfg, section, config)
    found = None if tokenizer is None else tasks.check_data(cfg, tokenizer, section)
    functions = None
    if found is not None and algebra is not None:
        tasks.check_size(section, found, algebra)
        tasks.check_columns(cfg, section, found)
        if not section.errors:
            functions, _ = build.rewards(cfg)
            section.attempt(probe_rewards, functions, found.first(1), algebra.group_on_a_rank)
    if not section.errors:
        longest = tasks.check_prompts(cfg, section, found, tokenizer, context_of(config))
        check_memory(cfg, section, config, args, pipeline, longest)
    _raise(section)
    return Ready(pipeline, args, algebra, path, tokenizer, found, functions, section.advice)


def _raise(section: Section) -> None:
    if len(section.errors) == 1:
        raise ConfigError(section.errors[0])
    if section.errors:
        raise ConfigError(f"{len(section.errors)} things to mend:\n" + "\n".join(f"  x {e}" for e in section.errors))
