"""The composition of an evaluation: several sets, kept samples, metrics by set, or another harness instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl import build, harness, rundir
from rl.config import compose, did_you_mean
from rl.draw import prompt_ids
from rl.errors import ConfigError
from rl.eval_view import Drawing, show_problems, show_sets, show_tasks
from rl.evaluate import Evaluation, Kept, evaluate
from rl.paths import find_model, plain_name
from rl.problems import Problems, problem_sets
from rl.quiet import quiet
from rl.samples import base_of_adapters, model_fact

ENGINES = ("native", *harness.ENGINES)


def run_eval(target: str | None, cfg: DictConfig, out: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run folder, a saved model or a hub model on the configuration's sets; returns the metrics of each set.

    Started again with the same arguments after it was killed, it goes on where it was; finished samples are only graded again.

    Args:
        target: what to evaluate, None for ``cfg.model.path``. out: folder for the samples (parquet) and metrics (json), default
            the run folder's ``eval/``, or ``<run.dir>/eval_<target>/`` when the target is no run folder. overrides: those of
            the command line; another harness gets only the decoding that they name.

    Raises:
        ConfigError: an unknown engine, a harness that is not installed or fails, or what :func:`rl.evaluate.evaluate` raises.
    """
    quiet()
    check_engine(cfg)
    build.use_threads(cfg.engine.threads)
    build.check_seed("eval.seed", cfg.eval.seed)
    path = find_model(target or cfg.model.path)
    folder = Path(out) if out else eval_folder(target or cfg.model.path, cfg)
    if cfg.eval.engine != "native":
        return _elsewhere(cfg, path, folder, overrides)
    tokenizer = build.tokenizer(with_tokenizer(path), cfg.model)
    build.decoding(cfg)
    sets = limited(problem_sets(cfg, tokenizer), cfg.eval.limit)
    for name, problems in sets.items():
        prompt = tokenizer.decode(prompt_ids(tokenizer, problems.heldout[0]["prompt"]))
        show_problems(name, len(problems.heldout), prompt, problems.answers, problems.strict_answers)
    if cfg.dry_run:
        print("dry run: everything is in order, nothing was sampled or written.")
        return {}
    model = build.language_model(path, cfg.model)
    names = sample_names(sets, cfg)
    found = evaluate_sets(cfg, sets, folder, names, model, tokenizer, path)
    metrics = {name: evaluation.metrics for name, evaluation in found.items()}
    show_sets(metrics, {n: len(p.heldout) for n, p in sets.items()}, target or cfg.model.path)
    for name in sets:
        rundir.write_json(folder / f"{names[name]}.json", metrics[name])
        print(f"samples and metrics: {folder / names[name]}.parquet and .json")
    return metrics


def eval_folder(target: str, cfg: DictConfig) -> Path:
    """Where evaluations of a run folder or a model are kept, if nothing else is said."""
    is_run = (Path(target) / "manifest.json").is_file()
    return Path(target) / "eval" if is_run else Path(cfg.run.dir) / f"eval_{plain_name(target)}"


def sample_names(sets: Mapping[str, Problems], cfg: DictConfig) -> dict[str, str]:
    """The names under which samples of each set are kept."""
    return {name: f"{plain_name(name)}_t{cfg.eval.temperature:g}_n{cfg.eval.samples}" for name in sets}


def evaluate_sets(
    cfg: DictConfig,
    sets: Mapping[str, Problems],
    folder: Path,
    names: Mapping[str, str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Evaluation]:
    """Evaluate a model on every set, keeping the samples under ``names`` in ``folder``. Args: path: where the model is from.

    Ranks above 0 help with the sampling and get nothing.
    """
    weights = {
        "files": model_fact(path, getattr(model.config, "_commit_hash", None)),
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
    }
    found = {}
    for name, problems in sets.items():
        drawing, start = Drawing(f"eval {name}"), time.perf_counter()
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
            strict_grader=problems.strict_grader,
            strict_answers=problems.strict_answers,
            kept=Kept(folder, names[name], weights, lambda note, name=name: print(f"samples   {names[name]}: {note}")),
            progress=drawing,
            stop=stop,
        )
        if evaluation is None:
            continue
        found[name] = evaluation
        print(f"drawn     {names[name]}: {drawing.summary(time.perf_counter() - start)}")
    return found


def training_sets(cfg: DictConfig, problems: Problems, tokenizer: PreTrainedTokenizerBase) -> dict[str, Problems]:
    """What a training is evaluated on: the sets of ``eval.sets`` or of a mixture, else the run's own held-out problems.

    The first is the run's main set.
    """
    several = cfg.eval.sets or "sets" in cfg.data
    return limited(problem_sets(cfg, tokenizer) if several else {problems.name: problems}, cfg.eval.limit)


def limited(sets: Mapping[str, Problems], limit: int | None) -> dict[str, Problems]:
    """The sets with their first ``limit`` held-out problems; None for all."""
    return {name: replace(p, heldout=p.heldout[:limit]) for name, p in sets.items()}


def check_engine(cfg: DictConfig, training: bool = False) -> None:
    """Raise ConfigError for an unknown engine, for tasks without one that knows them, and for another one in a training."""
    engine = cfg.eval.engine
    if engine not in ENGINES:
        raise ConfigError(
            f"eval.engine={engine} is not known.{did_you_mean(str(engine), ENGINES)} Expected one of: {', '.join(ENGINES)}."
        )
    if training and engine != "native":
        raise ConfigError(
            f"eval.engine={engine} is for entrl eval. Train with eval.engine=native, then: entrl eval runs/NAME eval.engine={engine}."
        )
    if engine == "native" and (cfg.eval.tasks or cfg.eval.engine_args):
        raise ConfigError(
            "eval.tasks and eval.engine_args are for eval.engine=lm_eval or lighteval. The native engine takes "
            "problems from data= or eval.sets=[...]."
        )


def _elsewhere(cfg: DictConfig, path: str, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    e = cfg.eval
    named = {o.lstrip("+~").split("=")[0] for o in overrides}
    job = harness.Job(
        model=path,
        tasks=list(e.tasks),
        output=folder / e.engine,
        dtype=cfg.model.dtype if torch.cuda.is_available() else "float32",
        revision=cfg.model.revision,
        trust_remote_code=cfg.model.trust_remote_code,
        decoding={k: e[k] for k in harness.DECODING if f"eval.{k}" in named},
        batch_size=e.batch_size if "eval.batch_size" in named else None,
        limit=e.limit,
        seed=e.seed if "eval.seed" in named else None,
        words=[str(word) for word in e.engine_args],
    )
    if cfg.dry_run:
        print(harness.shown(harness.command(e.engine, job)))
        return {}
    metrics = harness.run(e.engine, job)
    show_tasks(metrics, f"{path}, by {e.engine}")
    written = folder / f"{e.engine}_{plain_name('_'.join(job.tasks))[:80]}.json"
    rundir.write_json(written, metrics)
    print(f"metrics: {written}; what the harness wrote: {job.output}")
    return {e.engine: metrics}


def with_tokenizer(path: str) -> str:
    """Where the tokenizer of a model is: adapters that were saved without one have that of their base model."""
    base = base_of_adapters(path)
    return path if base is None or (Path(path) / "tokenizer_config.json").is_file() else base


def config_for(target: str | None, overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """The configuration to look at a model with: a run folder's own (:func:`eval_config`); a saved or a hub model does not get the
    lengths and options of the embedded one, unless ``model=`` says so."""
    named = {o.lstrip("+~").split("=")[0] for o in overrides}
    own = target is None or (Path(target) / "config.yaml").is_file() or target.startswith("builtin:")
    if own or "model" in named:
        return eval_config(target, compose(overrides, config_dir), overrides)
    cfg = compose(["model=local", "model.path=null", *overrides], config_dir)
    cfg.model.path = target  # not by an override, in which quotes would have a meaning
    return eval_config(target, cfg, overrides)


def eval_config(target: str | None, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration to evaluate ``target`` with: a run folder brings its own data, sets, model settings and length.

    What the command line sets wins. Unless it says otherwise, all problems are evaluated (``eval.limit`` is of trainings).

    Raises:
        ConfigError: a config.yaml that cannot be used, or a setting of a data set that is not the run's.
    """
    named = {o.lstrip("+~").split("=")[0] for o in overrides}
    cfg = cfg.copy()
    if "eval.limit" not in named:
        cfg.eval.limit = None
    config = Path(target) / "config.yaml" if target else None
    if config is None or not config.is_file():
        return cfg
    own = OmegaConf.load(config)
    groups = {name.split(".")[0] for name in named}
    setting = next((n for n in sorted(named) if n.startswith("data.")), None)
    try:
        if setting and "data" not in named and own.data.name != cfg.data.name:
            raise ConfigError(
                f"{setting} would change data={cfg.data.name}, but {target} was trained on {own.data.name}. "
                f"Name the set as well: data={own.data.name} {setting}=..."
            )
        for key in ("model", "data", "engine", "trainer"):
            if key not in groups:
                cfg[key] = own[key]  # as a whole: keys of two different data sets do not mix
        if not {"eval.max_new_tokens", "trainer.max_completion_length"} & named:
            cfg.eval.max_new_tokens = own.eval.max_new_tokens
        if "data" not in groups and "eval.sets" not in named and "sets" in own.eval:
            cfg.eval.sets = own.eval.sets
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{config} cannot be used: {error}. Was it edited?") from error
    return cfg
