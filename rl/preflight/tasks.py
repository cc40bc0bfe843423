"""The problems and the rewards together: columns, prompts, and whether a right answer earns what it should."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from data.errors import DataError
from rewards.checked import Checked
from rewards.selfcheck import check
from rewards.text import text_of
from rl import build
from rl.draw import prompt_ids
from rl.options import BatchAlgebra
from rl.preflight.probe import outside_training, probe_rewards
from rl.preflight.report import Section
from rl.problems import Problems, problem_sets, problems

# What TRL and entrl hand to a reward beside the data's columns.
_GIVEN = {"prompts", "completions", "completion_ids", "mean_logp", "trainer_state", "log_metric", "log_extra"}
_SHOWN = 5


def check_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, section: Section) -> Problems | None:
    """The problems of a run; bad rows are noted and the others looked at all the same."""
    try:
        found = problems(cfg, tokenizer)
    except DataError as error:
        section.error(str(error))
        if "data.on_bad_row=skip" not in str(error):
            return None
        log = logging.getLogger("entrl.data")
        log.disabled = True  # the error above has said it
        try:
            found = section.attempt(problems, _skipping(cfg), tokenizer)
        finally:
            log.disabled = False
    if cfg.eval.sets:
        section.attempt(problem_sets, cfg, tokenizer)
    if found is not None:
        section.fact(found.describe())
    return found


def _skipping(cfg: DictConfig) -> DictConfig:
    """The configuration with every source told to leave bad rows out."""

    def changed(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: "skip" if k == "on_bad_row" else changed(v) for k, v in node.items()}
        return [changed(v) for v in node] if isinstance(node, list) else node

    return OmegaConf.create(changed(OmegaConf.to_container(cfg)))


def check_columns(cfg: DictConfig, section: Section, found: Problems) -> None:
    """The data's columns against what each reward asks for by name."""
    columns = set(found.first(1)[0])
    for name, node in cfg.reward.items():
        made = section.attempt(build.make, f"reward.{name}.fn", node.fn)
        if made is None:
            continue
        missing = [column for column in _asked_for(made) if column not in columns | _GIVEN]
        if missing:
            section.error(
                f"reward.{name} asks for the column {', '.join(map(repr, missing))}; data={cfg.data.name} has {', '.join(sorted(columns))}. "
                f"Map it: data.columns.{missing[0]}=NAME, or choose another reward."
            )


def _asked_for(reward: Callable) -> list[str]:
    return [
        name
        for name, p in signature(reward).parameters.items()
        if p.default is Parameter.empty and p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]


def check_prompts(
    cfg: DictConfig, section: Section, found: Problems, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> int:
    """Prompts as the model sees them, and whether prompt and completion fit its context; returns the longest in tokens.

    Args:
        context: tokens the model can hold, None where its configuration does not say.
    """
    rows = found.first(2000)
    lengths = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    longest, completion = max(lengths), cfg.trainer.max_completion_length
    section.fact(f"prompts of {min(lengths)} to {longest} tokens, completions of up to {completion}")
    if context is not None and (over := sum(n + completion > context for n in lengths)):
        section.error(
            f"{over} of {len(rows)} prompts with trainer.max_completion_length={completion} exceed the model's context of {context} tokens. "
            "Lower trainer.max_completion_length or data.filter.max_prompt_tokens."
        )
    same = {text_of(row["prompt"]) for row in rows} & {text_of(row["prompt"]) for row in found.heldout}
    if same and "majority_vote" not in cfg.reward:
        section.advise(
            f"{len(same)} held-out prompts are trained on as well, so evaluation would measure memory. "
            "Hold some out with data.holdout=N, or evaluate elsewhere: eval.sets=[...]."
        )
    for row in rows[:_SHOWN]:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        section.fact(f"prompt: {_shortened(prompt)}")
    return longest


def check_size(section: Section, found: Problems, algebra: BatchAlgebra) -> None:
    """Enough problems for one rollout."""
    if found.size is not None and found.size < algebra.prompts_per_rollout:
        section.error(
            f"data.train has {found.size} problems, a rollout takes {algebra.prompts_per_rollout} ({algebra}). "
            "Take more problems, or a smaller trainer.per_device_train_batch_size."
        )


def check_unknown_words(section: Section, found: Problems, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts of which the tokenizer knows little: the model and the data do not belong together."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    ids = [i for row in found.first(64) for i in prompt_ids(tokenizer, row["prompt"])]
    share = ids.count(unknown) / max(1, len(ids))
    if share > 0.05:
        section.advise(
            f"{share:.0%} of the prompts' tokens are unknown to the tokenizer: this model was not made for data={found.name}."
        )


def _shortened(text: str, width: int = 150) -> str:
    text = text.replace("\n", "\\n")  # one line a prompt
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"


def _as_in_training(reward: Callable) -> Callable:
    """The reward with what it would get from a trainer."""

    def call(prompts: list, completions: list, **columns) -> list[float]:
        return reward(prompts, completions, **{**outside_training([0] * len(completions)), **columns})

    return call


def rewarded_columns(rows: Sequence[dict]) -> dict[str, list]:
    """The rows' columns as a reward gets them."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def check_rewards(cfg: DictConfig, section: Section, found: Problems, group: int, count: int = 64) -> None:
    """Every reward on an empty group; the grader, and every reward that looks at the answer, on answers whose worth is known.

    Args:
        group: completions of a prompt that a reward gets at once. count: problems to take.
    """
    functions, _ = build.rewards(cfg)
    rows = found.first(count)
    section.attempt(probe_rewards, functions, rows, group)
    if section.errors:
        return
    solution = build.make("data.solution", cfg.data.solution) if "solution" in cfg.data and cfg.data.solution else None
    graders = {"data.grader": found.grader}
    for name, node in cfg.reward.items():
        made = build.make(f"reward.{name}.fn", node.fn)
        if node.fn != cfg.data.grader and "answer" in _asked_for(made):
            graders[f"reward.{name}"] = Checked(name, made)
    for key, grader in graders.items():
        checked = check(_as_in_training(grader), rows, limit=count, solution=solution)
        section.fact(f"{key} on {checked.rows} rows")
        for line in checked.lines():
            section.fact(f"  {line}")
        for problem in checked.problems():
            section.error(f"{key}: {problem}")
    others = [name for name in cfg.reward if f"reward.{name}" not in graders and cfg.reward[name].fn != cfg.data.grader]
    if others:
        section.fact(f"called on empty completions only, as they do not ask for an answer: {', '.join(others)}")
