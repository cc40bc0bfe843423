"""``entrl doctor``: everything that can be known to go wrong, in one report; and the brief form that ``train`` starts with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, PretrainedConfig
from trl import GRPOConfig

from rl import build
from rl.engine import engine
from rl.machine import machine
from rl.memory import estimate, quantized_bits
from rl.options import batch_algebra
from rl.pipeline import Pipeline
from rl.preflight import environment, settings, tasks
from rl.preflight.loading import check_model, dtype_of
from rl.preflight.report import Report, Section
from rl.preflight.sampling import check_rollouts
from rl.quiet import quiet
from rl.sizes import sizes

_LORA = "peft.LoraConfig"


def examine(overrides: Sequence[str], config_dir: str | None, rollouts: int) -> Report:
    """All checks on the configuration of these overrides; ``rollouts``: training problems to sample, 0 for none."""
    report = Report()
    with report.section("packages") as section:
        environment.check_packages(section)
    cfg, pipeline, args = None, None, None
    with report.section("configuration") as section:
        cfg = settings.compose_what_can_be(overrides, config_dir, section)
        pipeline, args = settings.check_settings(cfg, section)
    if cfg is None:
        return report
    path, tokenizer, config = None, None, None
    with report.section("model") as section:
        path, tokenizer = settings.model_path(cfg, section)
        config = None if path is None else section.attempt(model_config, path, cfg)
        if config is not None:
            check_model(cfg, section, config)
            size = sizes(config)
            section.fact(
                f"{cfg.model.path}, {size.parameters / 1e6:,.1f} M parameters, {context_of(config) or 'unknown'} tokens of context"
            )
    with report.section("machine") as section:
        weights = 0 if config is None else sizes(config).parameters * (4 if cfg.model.dtype == "float32" else 2)
        environment.check_machine(section, cfg.run.dir, weights, cfg.logger.mode)
    with report.section("batch") as section:
        if args is not None:
            settings.check_batch(cfg, section, pipeline, args)
    found, longest = None, None
    with report.section("data") as section:
        if tokenizer is None:
            section.fact("not looked at: without a model there is no tokenizer")
        else:
            found = tasks.check_data(cfg, tokenizer, section)
        if found is not None:
            longest = tasks.check_prompts(cfg, section, found, tokenizer, config and context_of(config))
            tasks.check_unknown_words(section, found, tokenizer)
            if args is not None:
                tasks.check_size(section, found, batch_algebra(cfg.trainer, settings.world(cfg)))
    with report.section("rewards") as section:
        if found is not None:
            tasks.check_columns(cfg, section, found)
            if not section.findings:
                algebra = None if args is None else batch_algebra(cfg.trainer, settings.world(cfg))
                group = cfg.trainer.num_generations if algebra is None else algebra.group_on_a_rank
                tasks.check_rewards(cfg, section, found, group)
    with report.section("memory") as section:
        if config is not None and args is not None and longest is not None:
            check_memory(cfg, section, config, args, pipeline, longest)
    with report.section("plug-ins") as section:
        if args is not None and (pipeline.plugins or pipeline.shadows):
            settings.check_plugins(section, pipeline, batch_algebra(cfg.trainer, settings.world(cfg)).on_policy)
    if rollouts:
        with report.section("rollouts") as section:
            if report.errors:
                section.fact("not sampled: mend the above first")
            else:
                functions, reward_weights = build.rewards(cfg)
                model = build.language_model(path, cfg.model)
                check_rollouts(cfg, section, found, functions, reward_weights, model, tokenizer, rollouts)
    return report


def model_config(path: str, cfg: DictConfig) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    return build.pretrained(
        AutoConfig, path, revision=cfg.model.revision, trust_remote_code=cfg.model.trust_remote_code
    )


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens of prompt and completion that the model can hold."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_memory(
    cfg: DictConfig, section: Section, config: PretrainedConfig, args: GRPOConfig, pipeline: Pipeline, longest: int
) -> None:
    """What the run will hold at its peak against what the machine has."""
    gpu, found_engine = torch.cuda.is_available(), engine(cfg)
    here = machine(".")
    if not gpu:  # the processes of a node share its memory
        here = replace(here, ram_available=here.ram_available // found_engine.processes)
    rollout = cfg.rollout.backend if cfg.rollout.backend != "vllm" else f"vllm_{args.vllm_mode}"
    # DeepSpeed casts what it gets
    dtype = "bfloat16" if found_engine.deepspeed and args.bf16 else dtype_of(cfg.model, config)
    lora = cfg.peft if cfg.peft and cfg.peft.get("_target_") == _LORA else None
    found = estimate(
        config,
        micro_batch=args.per_device_train_batch_size,
        prompt_tokens=longest,
        completion_tokens=args.max_completion_length,
        accumulation=args.gradient_accumulation_steps,
        sequences=args.per_device_train_batch_size * args.steps_per_generation,
        group=args.num_generations,
        rollout=rollout,
        device="cuda" if gpu else "cpu",
        dtype=dtype if gpu else "float32",
        autocast=bool(args.bf16 or args.fp16),
        attention=cfg.model.attn_implementation or "sdpa",
        checkpointing=bool(args.activation_checkpointing or args.gradient_checkpointing),
        optim=getattr(args.optim, "value", args.optim),
        lora_rank=lora.r if lora else 0,
        lora_targets=lora.target_modules if lora else "all-linear",
        linear_bits=quantized_bits(cfg.model.quantization),
        beta=args.beta,
        full_kl="full_kl" in pipeline.needs,
        world=found_engine.world,
        zero_stage=found_engine.stage,
        offload=found_engine.offload,
        vllm_gpu_memory_utilization=args.vllm_gpu_memory_utilization if args.use_vllm else 0.0,
        machine=here,
    )
    for line in found.lines():
        section.fact(line)
    if found.fits() is False:
        section.error(
            f"The run would take {found.total / 2**30:.1f} GiB of the {(found.available or math.nan) / 2**30:.1f} GiB there are. {found.advice()}"
        )


def check_rewards(cfg: DictConfig) -> int:
    """``entrl rewards check``: print what each reward makes of right, wrong and empty answers; 2 when something is wrong."""
    quiet()
    report = Report()
    with report.section("data") as section:
        path, tokenizer = settings.model_path(cfg, section)
        found = tokenizer and tasks.check_data(cfg, tokenizer, section)
    with report.section("rewards") as section:
        if found:
            tasks.check_columns(cfg, section, found)
            tasks.check_rewards(cfg, section, found, cfg.trainer.num_generations, count=256)
    for line in report.lines():
        print(line)
    return 2 if report.errors else 0
