"""Other people's harnesses on a checkpoint: lm-evaluation-harness and lighteval, by their own command lines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rl.errors import ConfigError
from rl.samples import base_of_adapters

ENGINES = ("lm_eval", "lighteval")
_INSTALL = {"lm_eval": "pip install 'entrl[eval]'", "lighteval": "pip install lighteval"}
# what our decoding is called there
DECODING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "max_new_tokens": "max_gen_toks",
}


@dataclass(frozen=True)
class Job:
    """What a harness is asked for. ``None`` and what is missing in ``decoding`` is left to the task's own definition.

    Attributes:
        model: a hub id, or a folder with a model or adapters. decoding: of the keys of ``DECODING``. words: added as they are.
    """

    model: str
    tasks: Sequence[str]
    output: Path
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    decoding: Mapping[str, float | int] = field(default_factory=dict)
    batch_size: int | None = None
    limit: int | None = None
    seed: int | None = None
    words: Sequence[str] = ()


def command(engine: str, job: Job) -> list[str]:
    """The command line that evaluates ``job``.

    Raises:
        ConfigError: no task, an option the harness does not have, or a name that its ``key=value`` lists cannot hold.
    """
    if not job.tasks:
        raise ConfigError(f"eval.engine={engine} needs tasks. Expected names it knows: 'eval.tasks=[gsm8k]'.")
    return _lm_eval(job) if engine == "lm_eval" else _lighteval(job)


def _lm_eval(job: Job) -> list[str]:
    words = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", _pairs(_lm_eval_model(job))]
    words += ["--tasks", ",".join(job.tasks), "--output_path", str(job.output), "--log_samples"]
    words += ["--batch_size", "auto" if job.batch_size is None else str(job.batch_size)]
    if job.decoding:
        given = {DECODING[name]: value for name, value in job.decoding.items()}
        if "temperature" in given:
            given["do_sample"] = given["temperature"] > 0
        words += ["--gen_kwargs", _pairs(given)]
    for option, value in (("--limit", job.limit), ("--seed", job.seed)):
        words += [] if value is None else [option, str(value)]
    return [*words, *job.words]


def _lm_eval_model(job: Job) -> dict[str, Any]:
    base = base_of_adapters(job.model)
    found: dict[str, Any] = {"pretrained": job.model if base is None else base}
    if base is not None:
        found["peft"] = job.model
        if (Path(job.model) / "tokenizer_config.json").is_file():
            found["tokenizer"] = job.model
    found["dtype"] = job.dtype
    if job.revision is not None:
        found["revision"] = job.revision
    if job.trust_remote_code:
        found["trust_remote_code"] = True
    return found


def _lighteval(job: Job) -> list[str]:
    if base_of_adapters(job.model) is not None:
        raise ConfigError(
            f"{job.model} holds adapters, which lighteval merges in half precision. Merge them yourself and save the model "
            "(peft's merge_and_unload, save_pretrained), or take eval.engine=lm_eval."
        )
    if job.decoding or job.seed is not None:
        raise ConfigError(
            "eval.engine=lighteval samples as its tasks say: eval.seed, eval.temperature and the like do not reach it. Leave "
            "them out, or take eval.engine=lm_eval."
        )
    model: dict[str, Any] = {"model_name": job.model, "dtype": job.dtype}
    if job.revision is not None:
        model["revision"] = job.revision
    if job.trust_remote_code:
        model["trust_remote_code"] = True
    if job.batch_size is not None:
        model["batch_size"] = job.batch_size
    words = [sys.executable, "-m", "lighteval", "accelerate", _pairs(model), ",".join(job.tasks)]
    words += ["--output-dir", str(job.output), "--save-details"]
    words += [] if job.limit is None else ["--max-samples", str(job.limit)]
    return [*words, *job.words]


def _pairs(values: Mapping[str, Any]) -> str:
    """``a=1,b=2``, as both harnesses read it."""
    for name, value in values.items():
        if "," in str(value) or "=" in str(value):
            raise ConfigError(
                f"{name}={value} cannot be handed to the harness: it reads key=value lists, so neither , nor = may be in it. "
                "Rename the folder, or link to it."
            )
    return ",".join(f"{name}={value}" for name, value in values.items())


def shown(words: Sequence[str]) -> str:
    """A command line to copy."""
    return shlex.join(["python", *words[1:]])


def run(engine: str, job: Job) -> dict[str, float]:
    """Run the harness, which prints what it does, and return its metrics as ``<task>/<name it has there>``.

    Raises:
        ConfigError: it is not installed, fails or writes no results.
    """
    words = command(engine, job)
    if find_spec(engine) is None:
        raise ConfigError(
            f"eval.engine={engine} is not installed. Run {_INSTALL[engine]}, or leave eval.engine=native."
        )
    print(shown(words), flush=True)
    before = set(_results(job.output))
    done = subprocess.run(words)
    if done.returncode:
        raise ConfigError(
            f"{engine} ended with exit code {done.returncode}; it says why above. The command is: {shown(words)}"
        )
    new = [p for p in _results(job.output) if p not in before]
    if not new:
        raise ConfigError(f"{engine} wrote no results_*.json into {job.output}. What it printed above may say why.")
    return read_results(new[-1])


def _results(folder: Path) -> list[Path]:
    """Newest last."""
    return sorted(folder.rglob("results_*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))


def read_results(path: Path) -> dict[str, float]:
    """Every number in a harness's results, errors and all, as ``<task>/<name>``.

    Raises:
        ConfigError: a file of another shape.
    """
    try:
        tasks = json.loads(path.read_text())["results"]
        return {
            f"{task}/{name}": float(value)
            for task, metrics in tasks.items()
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no results file of lm_eval or lighteval. Expected {{'results': {{task: {{metric: number}}}}}}."
        ) from error
