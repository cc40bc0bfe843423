"""The composition root: one training run, or one evaluation, from a resolved configuration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from rl import build, rundir
from rl.callbacks.alarm import NoOpAlarm
from rl.callbacks.progress import Progress, show_sample, show_table
from rl.dynamics import Dynamics
from rl.errors import ConfigError
from rl.eval_run import evaluate_sets, training_sets
from rl.evaluate import Evaluation
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
    build.use_threads(cfg.engine.threads)
    mode = resolve_mode(cfg.logger.mode)
    ready = before_training(cfg)
    set_seed(cfg.seed)
    sets = training_sets(cfg, ready.problems, ready.tokenizer)
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
        summary = _train(cfg, folder, tracker, model, ready, sets, sampler, started)
        _farewell(folder, tracker, summary, next(iter(sets)))
    return folder


def _train(cfg, folder, tracker, model, ready: Ready, sets, sampler, started) -> dict[str, Any]:
    problems, tokenizer, main = ready.problems, ready.tokenizer, next(iter(sets))
    seconds = {"warmstart": 0.0, "train": 0.0, "eval": 0.0}
    before = _evaluate(cfg, sets, folder, "before", model, tokenizer, ready.path, seconds) if cfg.eval.before else {}
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
        dynamics=Dynamics(before[main].metrics["entropy/p80"] if before else None),
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
    final = str(folder / "checkpoints" / "final")
    trainer.save_model(final)
    if problems.size is None and trainer.state.global_step < ready.args.max_steps:
        raise ConfigError(
            f"data={cfg.data.name} ended after {trainer.state.global_step} of {ready.args.max_steps} steps: a stream is shorter than one "
            "rollout takes. Loosen data.filter, or set data.streaming=false."
        )
    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = _evaluate(cfg, sets, folder, "after", trained, tokenizer, final, seconds) if cfg.eval.after else {}
    seconds["total"] = time.perf_counter() - started
    print()
    metrics = {
        name: {when: e[name].metrics for when, e in (("before", before), ("after", after)) if e} for name in sets
    }
    for name, of_set in metrics.items():
        if of_set:
            title = f"{len(sets[name].heldout)} held-out problems of {name}"
            show_table(of_set.get("before"), of_set.get("after"), title)
    summary = {
        "eval": metrics[main],
        **({"sets": metrics} if len(sets) > 1 else {}),
        "seconds": seconds,
        "tokens_per_second": trainer.meter.tokens_per_second(),
        "plugins": list(cfg.plugin),
        "seed": cfg.seed,
        "steps": trainer.state.global_step,
    }
    rundir.write_json(folder / "summary.json", summary)
    return summary


def _evaluate(cfg, sets, folder: Path, when: str, model, tokenizer, path: str, seconds) -> dict[str, Evaluation]:
    start = time.perf_counter()
    names = {name: when if len(sets) == 1 else f"{when}_{name}" for name in sets}
    found = evaluate_sets(cfg, sets, folder / "eval", names, model, tokenizer, path)
    seconds["eval"] += time.perf_counter() - start
    return found


@contextmanager
def _recorded_end(folder: Path):
    """Whatever happens, the folder says how the run ended."""
    try:
        yield
    except BaseException as error:
        rundir.finish(folder, f"{type(error).__name__}: {error}")
        raise
    rundir.finish(folder)


def _farewell(folder: Path, tracker: Tracker, summary: Mapping[str, Any], main: str) -> None:
    flat = {
        f"eval/{name}/{'before/' if when == 'before' else ''}{k}": v
        for name, of_set in summary.get("sets", {main: summary["eval"]}).items()
        for when, metrics in of_set.items()
        for k, v in metrics.items()
    }
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
