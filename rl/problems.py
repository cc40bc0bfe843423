"""From the configuration's data sets to the problems a run trains and is evaluated on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from data.errors import DataError
from data.filters import Decontaminate, Duplicates, Filter, MaxTokens, PassRate, apply
from data.load import plain_text
from rewards.checked import Checked
from rl.build import make
from rl.draw import prompt_ids
from rl.errors import ConfigError

Grader = Callable[..., list[float]]
Answers = Callable[[list[str]], list[str | None]]

_FILTERS = {"max_prompt_tokens", "pass_rate", "duplicates", "similarity", "decontaminate", "ngram"}
_SAMPLE = 2000  # prompts of a stream that say what its instruction and its turns of phrase are


def grades(grader: Grader, row: Mapping[str, Any], completions: Sequence[str]) -> list[float]:
    """What a grader says of several completions of one problem, a row of a data set."""
    columns = {name: [value] * len(completions) for name, value in row.items() if name != "prompt"}
    return grader(prompts=[row["prompt"]] * len(completions), completions=list(completions), **columns)


@dataclass(frozen=True)
class Problems:
    """A data set as a run uses it.

    Attributes:
        train: None where only evaluation was asked for. dropped: reason -> training problems left out by the filters.
        strict_grader, strict_answers: count only answers given in the form that was asked for; None where a set has no such form.
    """

    name: str
    train: Dataset | IterableDataset | None
    heldout: list[dict]
    grader: Grader
    answers: Answers
    strict_grader: Grader | None = None
    strict_answers: Answers | None = None
    dropped: Counter = field(default_factory=Counter)

    @property
    def size(self) -> int | None:
        """Training problems; None for a stream."""
        return len(self.train) if isinstance(self.train, Dataset) else None

    def first(self, count: int) -> list[dict]:
        """The first training problems, as many as there are."""
        return list(islice(iter(self.train), count))

    def describe(self) -> str:
        """For the start of a run."""
        if self.size is None:
            return f"{self.name}, a stream of training and {len(self.heldout):,} held-out problems"
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        dropped = f" (left out: {left_out})" if left_out else ""
        return f"{self.name}, {self.size:,} training{dropped} and {len(self.heldout):,} held-out problems"


def problems(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, train: bool = True) -> Problems:
    """The set ``cfg.data``: training problems filtered, prompts as text where the tokenizer has no chat template.

    Raises:
        DataError: no data, a column missing, bad rows, or nothing left. ConfigError: no grader or no answers.
    """
    return _mixture(cfg, tokenizer, train) if "sets" in cfg.data else _single("data", cfg.data, tokenizer, train)


def problem_sets(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Problems]:
    """What is evaluated: ``eval.sets`` where there are any, else the held-out problems of the data set or of each in a mixture.

    Raises:
        ConfigError: two sets of one name, by which results go. DataError: as ``problems``.
    """
    if cfg.eval.sets:
        nodes = {f"eval.sets.{name}": node for name, node in cfg.eval.sets.items()}
    elif "sets" in cfg.data:
        nodes = {f"data.sets.{name}": node for name, node in cfg.data.sets.items()}
    else:
        nodes = {"data": cfg.data}
    names = Counter(node.name for node in nodes.values())
    if twice := next((name for name, count in names.items() if count > 1), None):
        keys = [key for key, node in nodes.items() if node.name == twice]
        raise ConfigError(
            f"{' and '.join(keys)} are all named {twice}, and results go by name. Name the others: {keys[-1]}.name=..."
        )
    return {node.name: _single(key, node, tokenizer, train=False) for key, node in nodes.items()}


def _single(key: str, node: DictConfig, tokenizer: PreTrainedTokenizerBase, train: bool) -> Problems:
    heldout = _part(f"{key}.heldout", node.heldout, tokenizer)
    found, dropped = None, Counter()
    if train:
        found = _part(f"{key}.train", node.train, tokenizer)
        found, dropped = apply(found, _filters(key, node, tokenizer, found))
    return Problems(node.name, found, heldout.to_list(), **graders(key, node), dropped=dropped)


def _mixture(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, train: bool) -> Problems:
    if not cfg.data.sets:
        raise ConfigError("data.sets is empty. Name what to mix: data=mixture 'data.sets=[gsm8k,math]'.")
    parts = [_single(f"data.sets.{name}", node, tokenizer, train) for name, node in cfg.data.sets.items()]
    if streams := [part.name for part in parts if isinstance(part.train, IterableDataset)]:
        raise ConfigError(f"data.sets.{streams[0]}.streaming=true: a stream cannot be mixed. Set it to false.")
    mixed = make("data.train", cfg.data.train)({p.name: p.train for p in parts}) if train else None
    dropped = sum((part.dropped for part in parts), Counter())
    heldout = [{**row, "source": part.name} for part in parts for row in part.heldout]
    return Problems(cfg.data.name, mixed, heldout, **graders("data", cfg.data), dropped=dropped)


def _part(key: str, node: Any, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    found = make(key, node)
    if isinstance(found, Dataset) and not len(found):
        raise DataError(f"{key} is empty. Expected at least one row.")
    return plain_text(found) if tokenizer.chat_template is None else found


def graders(key: str, node: DictConfig) -> dict[str, Any]:
    """``grader``, ``answers`` and their strict forms as the node at ``key`` says, None where it has no such form.

    Raises:
        ConfigError: no grader or no answers, or one that cannot be made.
    """
    for name in ("grader", "answers"):
        if not node[name]:
            raise ConfigError(
                f"{key}.{name} is not set. Expected a function: {key}.{name}={{_target_: ..., _partial_: true}}."
            )
    made = {
        name: make(f"{key}.{name}", node[name]) if name in node and node[name] else None
        for name in ("grader", "answers", "strict_grader", "strict_answers")
    }
    return {name: Checked(name, fn) if fn and name.endswith("grader") else fn for name, fn in made.items()}


def _filters(key: str, node: DictConfig, tokenizer, train: Dataset | IterableDataset) -> list[Filter]:
    options = node.filter if "filter" in node else None
    if not options:
        return []
    if missing := _FILTERS - set(options):
        raise ConfigError(
            f"{key}.filter lacks {', '.join(sorted(missing))}; configs/data/_table.yaml shows what it holds."
        )
    wants_sample = options.duplicates == "near" or options.decontaminate
    known = islice(iter(train), None if isinstance(train, Dataset) else _SAMPLE) if wants_sample else ()
    sample = [row["prompt"] for row in known]
    filters: list[Filter] = []
    if options.max_prompt_tokens is not None:
        filters.append(MaxTokens(lambda prompt: len(prompt_ids(tokenizer, prompt)), options.max_prompt_tokens))
    if options.pass_rate:
        if not isinstance(options.pass_rate, DictConfig):
            raise ConfigError(
                f"{key}.filter.pass_rate={options.pass_rate} is no map. Expected one, as {{low: 0.1, high: 0.9}}, or null."
            )
        filters.append(
            make(f"{key}.filter.pass_rate", {"_target_": f"{PassRate.__module__}.PassRate", **options.pass_rate})
        )
    if options.duplicates:
        filters.append(Duplicates(options.duplicates, options.similarity, sample))
    if options.decontaminate:
        evaluated = {
            name: [row["prompt"] for row in make(f"{key}.filter.decontaminate.{name}", other.heldout)]
            for name, other in options.decontaminate.items()
        }
        filters.append(Decontaminate(evaluated, sample, options.ngram))
    return filters
