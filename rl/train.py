"""The composition root: one training run, or one evaluation, from a resolved configuration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from rl import build, rundir
from rl import problems as problem_sets
from rl.callbacks.alarm import NoOpAlarm
from rl.callbacks.progress import Progress, show_sample, show_table
from rl.dynamics import Dynamics
from rl.errors import ConfigError
from rl.evaluate import Evaluation, evaluate
from rl.paths import find_model
from rl.preflight.brief import Ready, before_training
from rl.quiet import quiet
from rl.recorder import Recorder
from rl.tracking import Tracker, resolve_mode, without_secrets
from rl.trainer import EntropyTrainer


def run(cfg: DictConfig, overrides: Sequence[str], argv: Sequence[str]) -> Path | None:
    """Train as ``cfg`` says and return the run folder; None for a dry run, which does everything up to the training.

    Everything that can be wrong with the configuration, the data and the rewards is found before the folder is made.
    """
    quiet()
    started = time.perf_counter()
    if cfg.engine.threads:
        torch.set_num_threads(cfg.engine.threads)
    mode = resolve_mode(cfg.logger.mode)
    set_seed(cfg.seed)
    ready = before_training(cfg)
    name = cfg.run.name or rundir.run_name(cfg.model.name, cfg.data.name, list(cfg.plugin), cfg.seed)
    rundir.check_free(Path(cfg.run.dir), name, cfg.run.overwrite)
    model = build.language_model(ready.path, cfg.model)
    sampler = build.sampler(cfg, model, ready.args, ready.pipeline)
    print(f"model     {cfg.model.path}, {model.num_parameters() / 1e6:.1f} M parameters")
    print(f"data      {ready.problems.describe()}")
    print(f"plug-ins  {', '.join(cfg.plugin) or 'none: plain GRPO'}")
    print(f"batch     {ready.algebra.describe()}")
    for advice in ready.advice:
        print(f"advice    {advice}")
    if cfg.dry_run:
        print("dry run: everything is in order, nothing was trained or written.")
        return None
    folder = rundir.create(Path(cfg.run.dir), name, cfg.run.overwrite)
    public = without_secrets(OmegaConf.to_container(cfg))
    rundir.describe(folder, OmegaConf.to_yaml(OmegaConf.create(public)), overrides, argv, cfg.seed)
    print(f"run       {folder}\n")
    ready.args.output_dir = str(folder / "checkpoints")
    with (
        _recorded_end(folder),
        Tracker(
            folder,
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=mode,
            name=name,
            group=cfg.run.group,
            tags=list(cfg.plugin) or ["grpo"],
            config=public,
        ) as tracker,
    ):
        rundir.update_manifest(folder, {"wandb_id": tracker.id})
        summary = _train(cfg, folder, tracker, model, ready, sampler, started)
        _farewell(folder, tracker, summary)
    return folder


def _train(cfg, folder, tracker, model, ready: Ready, sampler, started) -> dict[str, Any]:
    problems, tokenizer = ready.problems, ready.tokenizer
    seconds = {"warmstart": 0.0, "train": 0.0, "eval": 0.0}
    before = _evaluate(cfg, folder / "eval", "before", model, tokenizer, problems, seconds) if cfg.eval.before else None
    recorder = Recorder(folder / "rollouts", every=cfg.record.every, max_rows=cfg.record.max_rows)

    def samples(step: int, metrics, histograms) -> None:
        if recorder.due(step):
            rows = recorder.sample(cfg.record.show)
            show_sample(step, rows)
            tracker.table(step, "rollouts", rows)

    trainer = EntropyTrainer(
        model=model,
        reward_funcs=ready.rewards,
        args=ready.args,
        train_dataset=problems.train,
        processing_class=tokenizer,
        peft_config=build.peft_config(cfg),
        pipeline=ready.pipeline,
        dynamics=Dynamics(before.metrics["entropy/p80"] if before else None),
        recorder=recorder,
        sinks=[tracker.log, Progress(ready.args.max_steps), samples, NoOpAlarm()],
        answers=problems.answers,
        sampler=sampler,
        train_share=cfg.rollout.train_share,
    )
    set_seed(cfg.seed)  # the same rollouts whether or not the model was evaluated before
    start = time.perf_counter()
    trainer.train()
    seconds["train"] = time.perf_counter() - start
    trainer.save_model(str(folder / "checkpoints" / "final"))
    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = _evaluate(cfg, folder / "eval", "after", trained, tokenizer, problems, seconds) if cfg.eval.after else None
    seconds["total"] = time.perf_counter() - started
    print()
    if before or after:
        show_table(before and before.metrics, after and after.metrics, f"{len(problems.heldout)} held-out problems")
    summary = {
        "eval": {k: e.metrics for k, e in (("before", before), ("after", after)) if e is not None},
        "seconds": seconds,
        "tokens_per_second": trainer.meter.tokens_per_second(),
        "plugins": list(cfg.plugin),
        "seed": cfg.seed,
        "steps": trainer.state.global_step,
    }
    rundir.write_json(folder / "summary.json", summary)
    return summary


def run_eval(target: str | None, cfg: DictConfig, out: str | None) -> Evaluation:
    """Evaluate a run folder, a saved model or a hub model on the configuration's held-out problems.

    Args:
        target: what to evaluate, None for ``cfg.model.path``. out: folder for the samples (parquet) and metrics (json), default
            the run folder's ``eval/``, or ``<run.dir>/eval_<target>/`` when the target is no run folder.
    """
    quiet()
    if cfg.engine.threads:
        torch.set_num_threads(cfg.engine.threads)
    path = find_model(target or cfg.model.path)
    tokenizer = build.tokenizer(path, cfg.model)
    problems = problem_sets.problems(cfg, tokenizer, train=False)
    model = build.language_model(path, cfg.model)
    seconds = {"eval": 0.0}
    is_run = target is not None and (Path(target) / "manifest.json").is_file()
    plain = "".join(c if c.isalnum() or c in "-._" else "_" for c in (target or cfg.model.path)).strip("_.")
    folder = Path(out) if out else Path(target) / "eval" if is_run else Path(cfg.run.dir) / f"eval_{plain}"
    name = f"{cfg.data.name}_t{cfg.eval.temperature:g}_n{cfg.eval.samples}"
    evaluation = _evaluate(cfg, folder, name, model, tokenizer, problems, seconds)
    show_table(
        None, evaluation.metrics, f"{target or cfg.model.path} on {len(problems.heldout)} problems of {cfg.data.name}"
    )
    tokens = evaluation.samples["tokens"].sum()
    print(f"{len(evaluation.samples)} samples, {tokens / seconds['eval']:,.0f} tokens/s")
    rundir.write_json(folder / f"{name}.json", evaluation.metrics)
    print(f"samples and metrics: {folder / name}.parquet and .json")
    return evaluation


def _evaluate(cfg, folder: Path, name: str, model, tokenizer, problems, seconds: dict[str, float]) -> Evaluation:
    start = time.perf_counter()
    evaluation = evaluate(
        model,
        tokenizer,
        problems.heldout,
        problems.grader,
        problems.answers,
        build.decoding(cfg),
        samples=cfg.eval.samples,
        ks=list(cfg.eval.ks),
        greedy=cfg.eval.greedy,
        seed=cfg.eval.seed,
    )
    seconds["eval"] += time.perf_counter() - start
    _save_samples(folder / f"{name}.parquet", evaluation.samples)
    return evaluation


def _save_samples(path: Path, samples: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    samples.to_parquet(partial, index=False)
    partial.replace(path)


@contextmanager
def _recorded_end(folder: Path):
    """Whatever happens, the folder says how the run ended."""
    try:
        yield
    except BaseException as error:
        rundir.finish(folder, f"{type(error).__name__}: {error}")
        raise
    rundir.finish(folder)


def _farewell(folder: Path, tracker: Tracker, summary: Mapping[str, Any]) -> None:
    flat = {f"eval/{when}/{k}": v for when, metrics in summary["eval"].items() for k, v in metrics.items()}
    where = tracker.where
    tracker.finish(flat)
    s = summary["seconds"]
    print(f"\n{summary['steps']} steps in {s['train']:.0f} s, evaluation {s['eval']:.0f} s, {s['total']:.0f} s in all")
    print(f"run folder  {folder}  (metrics.jsonl, summary.json, rollouts/, eval/, checkpoints/final)")
    if where is not None:
        print(f"W&B         {where}")
    print(f"next        entrl eval {folder}")
    print("            entrl train plugin=[]             plain GRPO, to compare: watch H fall")
    print("            entrl train plugin=[steer]        another method; entrl --help lists them")


def eval_config(target: str | None, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration to evaluate ``target`` with: a run folder brings its own data set and model settings.

    What the command line sets wins.
    """
    config = Path(target) / "config.yaml" if target else None
    if config is None or not config.is_file():
        return cfg
    own = OmegaConf.load(config)
    named = {o.lstrip("+~").split("=")[0].split(".")[0] for o in overrides}
    try:
        return OmegaConf.merge(
            cfg, {key: own[key] for key in ("model", "data", "engine", "trainer") if key not in named}
        )
    except Exception as error:
        raise ConfigError(f"{config} cannot be used: {error}. Was it edited?") from error
