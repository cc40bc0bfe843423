"""The composition root: one training run from a resolved configuration, and what each of its processes does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from rl import build, rundir
from rl.callbacks.alarm import Alarms, TakeAction
from rl.callbacks.forecast import WithForecast
from rl.callbacks.progress import Progress, show_sample
from rl.callbacks.stop import StopAtBoundary
from rl.checkpoint import manifest_of, newest_good, rewind
from rl.dynamics import Dynamics
from rl.engine import Engine, engine, enter, whole
from rl.errors import ConfigError, Stopped
from rl.eval_run import evaluate_sets, training_sets
from rl.evaluate import Evaluation
from rl.farewell import farewell, flat_metrics, show_evaluations
from rl.preflight.brief import Ready, before_training
from rl.prepare import check, read, refuse_secrets, to_resume, write
from rl.probes import Probes
from rl.problems import Problems
from rl.quiet import quiet
from rl.rank import attempt
from rl.recorder import Recorder
from rl.reduce import from_first, leave, rank
from rl.rundir import state
from rl.shadows import acting_plugins, shadow_plugins
from rl.stop import StopSignal
from rl.tracking import Tracker, resolve_mode
from rl.trainer import EntropyTrainer
from rl.wandb_run import read_lines


def run(cfg: DictConfig, overrides: Sequence[str], argv: Sequence[str]) -> Path | None:
    """Train as ``cfg`` says and return the run folder; None for a dry run, which does everything up to the training.

    Everything that can be wrong with the configuration, the data and the rewards is found before the folder is made. One process
    trains in place; for several this process becomes the launcher and does not return.

    Raises:
        Stopped: a signal ended the run, with a checkpoint.
    """
    quiet()
    started = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "entrl train starts its processes itself, as engine=ddp engine.processes=8. For another launcher: entrl prepare ..., and "
            "then torchrun ... -m rl.rank RUN."
        )
    folder = to_resume(cfg)
    if folder is not None and cfg.dry_run:
        print(f"dry run: {folder} would go on from {newest_good(folder / 'checkpoints') or 'its beginning'}.")
        return None
    if folder is not None:
        return resume(folder)
    found = engine(cfg)
    if found.nodes > 1:
        raise ConfigError(
            f"engine.nodes={found.nodes}, and entrl train starts processes on this machine only. Use entrl slurm submit, or entrl "
            "prepare and then torchrun on every node (docs/engines.md)."
        )
    in_place = _in_place(cfg)
    build.use_threads(cfg.engine.threads)
    ready = check(cfg)
    set_seed(cfg.seed)
    # several processes load their own, and this one would keep memory of the first GPU
    model = build.language_model(ready.path, cfg.model) if in_place else None
    if in_place:
        build.sampler(cfg, model, ready.args, ready.pipeline)
    _announce(cfg, found, ready, model)
    if cfg.dry_run:
        print("dry run: everything is in order, nothing was trained or written.")
        return None
    if not in_place:
        refuse_secrets(cfg)
    folder = write(cfg, overrides, argv, found)
    print(f"run       {folder}\n", flush=True)
    if not in_place:
        _become_the_launcher(folder)
    with StopSignal() as stop, attempt(folder, 0, redirect=False):
        _train_in(folder, read(folder), ready, stop, model, started)
    return folder


def resume(folder: Path) -> Path:
    """Go on with a run folder from its newest good checkpoint, in this process or as the launcher of several.

    A run that is done and has all its steps is left alone.
    """
    cfg = read(folder)
    if state(folder) == "done" and _steps(folder) >= cfg.trainer.max_steps:
        print(f"{folder} is finished: {_steps(folder)} steps. Nothing to do.")
        return folder
    if state(folder) == "done" and (alarm := _stopped_by(folder, cfg)) is not None:
        print(
            f"{folder} was ended at step {_steps(folder)} by its alarm {alarm}. To go on all the same: entrl train resume=auto "
            f"run.name={folder.name} alarm.{alarm}.action=log ..., with its other settings as they were."
        )
        return folder
    if not _in_place(cfg):
        _become_the_launcher(folder)
    with StopSignal() as stop, attempt(folder, 0, redirect=False):
        work(folder, stop)
    return folder


def _in_place(cfg: DictConfig) -> bool:
    """Whether the run is this very process: one, without DeepSpeed's environment and without a server beside it."""
    return engine(cfg).world == 1 and not cfg.engine.deepspeed and cfg.rollout.get("server") is None


def _steps(folder: Path) -> int:
    return rundir.read_json(folder / "summary.json").get("steps", 0)


def _stopped_by(folder: Path, cfg: DictConfig) -> str | None:
    """The alarm that ended a run, as long as ``cfg`` still says that it does."""
    alarm = rundir.read_json(folder / "summary.json").get("stopped_by")
    watch = build.watches(cfg).get(alarm)
    return alarm if watch is not None and "stop" in watch.actions else None


def _become_the_launcher(folder: Path) -> None:
    """This process goes on as the launcher, so that nothing it has loaded stays in memory."""
    sys.stdout.flush()
    sys.stderr.flush()
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder called data in the current one would hide ours
    os.execve(sys.executable, [sys.executable, "-m", "rl.launch", str(folder)], environ)


def work(folder: Path, stop: StopSignal) -> None:
    """What one rank does of the run that ``folder`` was prepared for, from the newest good checkpoint if there is one.

    Raises:
        Stopped: a signal ended the run, with a checkpoint. ConfigError: what only this machine could tell.
    """
    quiet()
    started = time.perf_counter()
    cfg = read(folder)
    enter(folder, engine(cfg, here=False))
    build.use_threads(cfg.engine.threads)
    ready = before_training(cfg, new=False)
    set_seed(cfg.seed)
    model = build.language_model(ready.path, cfg.model)
    try:
        _train_in(folder, cfg, ready, stop, model, started)
    except Stopped:
        leave()
        raise
    leave()  # but not after an error, where NCCL would wait for ranks that do not come


def _announce(cfg: DictConfig, found: Engine, ready: Ready, model: PreTrainedModel | None) -> None:
    size = f", {model.num_parameters() / 1e6:.1f} M parameters" if model is not None else ""
    print(f"model     {cfg.model.path}{size}")
    print(f"data      {ready.problems.describe()}")
    print(f"plug-ins  {', '.join(acting_plugins(cfg)) or 'none: plain GRPO'}")
    if shadows := shadow_plugins(cfg):
        print(f"shadows   {', '.join(shadows)}: measured, they change nothing")
    print(f"batch     {ready.algebra.describe()}")
    if found.world > 1 or found.deepspeed:
        print(f"engine    {found.describe()}")
    for advice in ready.advice:
        print(f"advice    {advice}")


def _train_in(folder: Path, cfg, ready: Ready, stop: StopSignal, model, started: float) -> None:
    sets = training_sets(cfg, ready.problems, ready.tokenizer)
    ready.args.output_dir = str(folder / "checkpoints")
    checkpoints = build.checkpoints(cfg, folder / "checkpoints")
    newest = from_first(checkpoints.newest_good(ready.algebra.world) if rank() == 0 else None)
    if rank() == 0:
        rewind(folder, int(newest.name.rpartition("-")[2]) if newest else 0)
        if newest:
            print(f"resumes   {newest}", flush=True)
    r = cfg.record
    recorder = Recorder(folder / "rollouts", every=r.every, max_rows=r.max_rows, alternatives=r.alternatives)
    watches = build.watches(cfg)
    with _tracker(folder, cfg) as tracker:
        alarms = None if tracker is None else Alarms(folder, watches, tracker.alert)
        sink = None if tracker is None else _sink(cfg, ready, recorder, tracker, alarms)
        if newest and from_first(alarms and alarms.stopped_by):  # stopped again in the evaluation after that
            ready.args.max_steps = manifest_of(newest)["step"]
        trainer = _trainer(cfg, ready, model, recorder, checkpoints, sink)
        if r.every and r.probes:
            trainer.add_callback(_probes(cfg, folder, trainer, next(iter(sets.values()))))
        trainer.add_callback(StopAtBoundary(stop, trainer.accelerator.device))
        action = TakeAction(alarms, trainer.accelerator.device)
        if any({"checkpoint", "stop"} & set(watch.actions) for watch in watches.values()):
            trainer.add_callback(action)
        summary = _evaluate_and_train(cfg, folder, trainer, tracker, ready, sets, stop, action, newest, started)
        if tracker is not None:
            tracker.finish(flat_metrics(summary, next(iter(sets))))
            farewell(folder, tracker.where, summary)


@contextmanager
def _tracker(folder: Path, cfg: DictConfig) -> Iterator[Tracker | None]:
    """The first rank's log; the others have none."""
    if rank() > 0:
        yield None
        return
    with Tracker(
        folder,
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        mode=resolve_mode(cfg.logger.mode),
        name=cfg.run.name,
        group=cfg.run.group,
        tags=[*(acting_plugins(cfg) or ["grpo"]), *(f"shadow:{name}" for name in shadow_plugins(cfg))],
        config=OmegaConf.to_container(cfg),
        init_timeout=cfg.logger.init_timeout,
        finish_timeout=cfg.logger.finish_timeout,
    ) as tracker:
        rundir.update_manifest(folder, {"wandb_id": tracker.id})
        try:
            yield tracker
        except Stopped:
            tracker.finish({})  # it goes on: W&B need not call it failed
            raise


def _sink(cfg, ready: Ready, recorder: Recorder, tracker: Tracker, alarms: Alarms) -> WithForecast:
    """Everything that happens to a step's metrics; it knows the steps of earlier starts."""

    def samples(step: int, metrics, histograms) -> None:
        if recorder.due(step):
            rows = recorder.sample(cfg.record.show)
            show_sample(step, rows)
            tracker.table(step, "rollouts", rows)

    sink = WithForecast([tracker.log, Progress(ready.args.max_steps), samples, alarms])
    sink.replay(read_lines(tracker.folder / "metrics.jsonl"))
    return sink


def _trainer(cfg, ready: Ready, model, recorder: Recorder, checkpoints, sink: WithForecast | None) -> EntropyTrainer:
    return EntropyTrainer(
        model=model,
        reward_funcs=ready.rewards,
        args=ready.args,
        train_dataset=ready.problems.train,
        processing_class=ready.tokenizer,
        peft_config=build.peft_config(cfg),
        pipeline=ready.pipeline,
        dynamics=Dynamics(None),
        recorder=recorder,
        checkpoints=checkpoints,
        sinks=[] if sink is None else [sink],
        answers=ready.problems.answers,
        sampler=build.sampler(cfg, model, ready.args, ready.pipeline),
        train_share=cfg.rollout.train_share,
    )


def _probes(cfg, folder: Path, trainer: EntropyTrainer, main: Problems) -> Probes:
    r, rows = cfg.record, main.heldout[: cfg.record.probes]
    if rank() == 0 and len(rows) < r.probes:
        print(f"probes    {len(rows)} instead of record.probes={r.probes}: {main.name} has no more to evaluate on here")
    return Probes(
        trainer, folder / "probes", rows, main.grader, every=r.every, seed=cfg.seed, alternatives=r.alternatives
    )


def _evaluate_and_train(
    cfg,
    folder,
    trainer,
    tracker: Tracker | None,
    ready: Ready,
    sets,
    stop,
    action: TakeAction,
    newest: Path | None,
    started,
) -> dict[str, Any]:
    seconds, main = {"warmstart": 0.0, "train": 0.0, "eval": 0.0}, next(iter(sets))

    def evaluated(when: str, path: str) -> dict[str, Evaluation]:
        start = time.perf_counter()
        names = {name: when if len(sets) == 1 else f"{when}_{name}" for name in sets}
        with whole(trainer.model_wrapped, trainer.accelerator) as model:
            found = evaluate_sets(cfg, sets, folder / "eval", names, model, ready.tokenizer, path, lambda: bool(stop))
        seconds["eval"] += time.perf_counter() - start
        if tracker is not None:
            metrics = {f"eval/{name}/{k}": v for name, e in found.items() for k, v in e.metrics.items()}
            tracker.evaluated(trainer.state.global_step, metrics)
        return found

    before = evaluated("before", ready.path) if cfg.eval.before else {}
    trainer.dynamics.reference_p80 = from_first(before[main].metrics["entropy/p80"] if before else None)
    # the same rollouts whether or not the model was evaluated before, and of each rank its own
    set_seed(cfg.seed, device_specific=True)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    seconds["train"] = time.perf_counter() - start
    step, end = trainer.state.global_step, ready.args.max_steps
    if stop.agreed and step < end:
        raise Stopped(f"{stop} at step {step} of {end}")
    final = str(trainer.save_final())
    if ready.problems.size is None and step < end and not action.stopped:
        raise ConfigError(
            f"data={cfg.data.name} ended after {step} of {end} steps: a stream is shorter than one rollout takes. Loosen "
            "data.filter, or set data.streaming=false."
        )
    try:
        after = evaluated("after", final) if cfg.eval.after else {}
    except Stopped:
        trainer.save_here()  # so that only the evaluation goes on
        raise
    seconds["total"] = time.perf_counter() - started
    evaluations = {
        name: {when: e[name].metrics for when, e in (("before", before), ("after", after)) if e} for name in sets
    }
    summary = _summary(cfg, trainer, evaluations, seconds, action.alarms and action.alarms.stopped_by)
    if rank() == 0:
        show_evaluations(evaluations, {name: len(problems.heldout) for name, problems in sets.items()})
        rundir.write_json(folder / "summary.json", summary)
    return summary


def _summary(cfg, trainer: EntropyTrainer, evaluations, seconds, stopped_by: str | None) -> dict[str, Any]:
    """What ``summary.json`` holds. Args: evaluations: by set, the main one first, then "before" or "after"."""
    return {
        "eval": next(iter(evaluations.values())),
        **({"sets": evaluations} if len(evaluations) > 1 else {}),
        "seconds": seconds,
        "tokens_per_second": trainer.meter.tokens_per_second(),
        "plugins": acting_plugins(cfg),
        "shadows": shadow_plugins(cfg),
        "seed": cfg.seed,
        "steps": trainer.state.global_step,
        **({"stopped_by": stopped_by} if stopped_by is not None else {}),
    }
