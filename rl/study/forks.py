"""``entrl forks``: which completion of which model is branched, who says what is right, and where the page goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rl import build
from rl.config import did_you_mean
from rl.draw import Decoding, prompt_ids
from rl.errors import ConfigError
from rl.eval_run import config_for, with_tokenizer
from rl.eval_view import Drawing
from rl.paths import find_model
from rl.problems import graders, grades, problem_sets
from rl.quiet import quiet
from rl.report.forks_page import write_forks
from rl.report.page import without_nan
from rl.rundir import write_json
from rl.study.branching import Options, Study, check_prompt, check_temperature, draw_completion, study
from rl.study.forks_view import print_forks
from rl.study.place import page_of

_COMPLETIONS = ("sample", "greedy")
_EXAMPLES = 3  # right ones and wrong ones to read, of each branch


class Question(NamedTuple):
    """What is asked, and who says what is right.

    Attributes:
        name: for people. prompt: text or a chat. grade: None where nobody knows the right answer.
    """

    name: str
    prompt: str | list[dict]
    answers: Callable[[list[str]], list[str | None]]
    grade: Callable[[list[str]], list[bool]] | None


def show_forks(
    target: str, prompts: Sequence[str], overrides: Sequence[str], config_dir: str | None, out: Path | None
) -> Path:
    """Branch one completion of a model, print the values, and write a page and, beside it, its numbers as JSON.

    Args:
        target: a run folder, a saved model or a hub model. prompts: one at most; without one a held-out problem is taken.
        out: the page; default ``<run folder>/forks.html`` or ``./forks_<model>.html``.

    Raises:
        ConfigError: a setting out of range, or what :func:`rl.study.branching.study` raises. ReportError: no place for the page.
        CheckpointError: no model.
    """
    quiet()
    cfg = config_for(target, overrides, config_dir)
    f = cfg.forks
    options = Options(f.tokens, f.branches, f.samples, f.seed, f.max_new_tokens)
    build.check_seed("forks.seed", f.seed)
    if f.completion not in _COMPLETIONS:
        raise ConfigError(
            f"forks.completion={f.completion} is not known.{did_you_mean(str(f.completion), _COMPLETIONS)} Expected sample or greedy."
        )
    if len(prompts) > 1:
        raise ConfigError(f"entrl forks takes one --prompt, and got {len(prompts)}. Run it once for each.")
    if cfg.eval.engine != "native":
        raise ConfigError(
            f"entrl forks draws by itself, and eval.engine={cfg.eval.engine} is another program. Leave it at native."
        )
    page = page_of(target, "forks", out)
    check_temperature(cfg.eval.temperature)
    decoding = build.decoding(cfg)
    build.use_threads(cfg.engine.threads)
    path = find_model(target)
    tokenizer = build.tokenizer(with_tokenizer(path), cfg.model)
    question = find_question(cfg, tokenizer, prompts[0] if prompts else None)
    prompt = list(prompt_ids(tokenizer, question.prompt))
    check_prompt(prompt)
    model, start = build.language_model(path, cfg.model), time.perf_counter()
    drawn_by = decoding.greedy() if f.completion == "greedy" else decoding
    completion = draw_completion(model, tokenizer, prompt, drawn_by, f.seed)
    progress = Drawing("forks")
    found = study(model, tokenizer, prompt, completion, decoding, options, question.answers, question.grade, progress)
    seconds = time.perf_counter() - start
    facts = {"model": target, "problem": question.name, "prompt": tokenizer.decode(prompt)}
    how = {"drawn": f.completion, "samples": options.samples, "seed": options.seed, "seconds": round(seconds, 1)}
    report = as_json(found, facts | how, decoding)
    print_forks(report)
    print(f"drawn     {progress.summary(seconds)}")
    write_forks(report, page)
    write_json(page.with_suffix(".json"), report)
    return page


def find_question(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, text: str | None) -> Question:
    """The problem ``forks.problem`` of the held-out ones, or a prompt of one's own, graded by what is known of it.

    Raises:
        ConfigError: no such problem, or an answer without a prompt.
    """
    f = cfg.forks
    if text is None and f.answer is not None:
        raise ConfigError("forks.answer is the answer to a --prompt. Give one, or drop forks.answer.")
    if f.answer is not None:
        judge = graders("forks", f)
        row = {"prompt": _asked(tokenizer, text), "answer": str(f.answer)}
        return _graded("the prompt", row, judge["answers"], judge["grader"])
    name, problems = next(iter(problem_sets(cfg, tokenizer).items()))
    rows = problems.heldout
    if text is not None:
        number = next((i for i, row in enumerate(rows) if _text(row["prompt"]).strip() == text.strip()), None)
        if number is None:
            return Question("the prompt", _asked(tokenizer, text), graders("forks", f)["answers"], None)
    else:
        number = f.problem
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(rows):
            raise ConfigError(
                f"forks.problem={number} does not exist. {name} has {len(rows):,} held-out problems: 0 to {len(rows) - 1}."
            )
    return _graded(f"problem {number} of {name}", rows[number], problems.answers, problems.grader)


def _graded(name: str, row: dict[str, Any], answers, grader) -> Question:
    def grade(texts: list[str]) -> list[bool]:
        return [g >= 0.5 for g in grades(grader, row, texts)]

    return Question(name, row["prompt"], answers, grade)


def _asked(tokenizer: PreTrainedTokenizerBase, text: str) -> str | list[dict]:
    """A prompt of one's own: what a user says to a chat model, else text as it is."""
    return text if tokenizer.chat_template is None else [{"role": "user", "content": text}]


def _text(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def as_json(found: Study, facts: dict[str, Any], decoding: Decoding) -> dict[str, Any]:
    """Facts and numbers as plain JSON, of the continuations a few to read; what is unknown is None."""
    made = without_nan(asdict(found)) | facts | {"decoding": asdict(decoding)}
    for fork in made["forks"]:
        for branch in fork["branches"]:
            samples = branch.pop("samples")
            branch["truncated"] = sum(s["truncated"] for s in samples)
            kinds = ([s for s in samples if s["right"] is kind] for kind in (True, False, None))
            branch["examples"] = [s for kind in kinds for s in _different(kind)[:_EXAMPLES]]
    return made


def _different(samples: list[dict]) -> list[dict]:
    return list({s["text"]: s for s in samples}.values())
