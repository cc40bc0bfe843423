"""The embedded task: Countdown with worked steps, unlimited problems from a seed.

Use every number once with + - * to reach the target, every intermediate result in 0..value_max::

    prompt      3 7 2 9 > 29 :
    completion  3 * 7 = 21 ; 21 - 2 = 19 ; ...

Which pair to combine next is a genuine fork (some continuations reach the target, most do not); the arithmetic after it is
nearly deterministic. That gives a tiny model the entropy profile the papers describe for large ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from datasets import Dataset

from data.errors import DataError

Split = Literal["train", "heldout"]
Pool = tuple[int, ...]

NUMBER_MAX = 9
VALUE_MAX = 31
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = (*SPECIAL, *map(str, range(VALUE_MAX + 1)), "+", "-", "*", "=", ";", ">", ":")

_HELDOUT_OF_256 = 26  # about 10 %


class Problem(NamedTuple):
    """Numbers in the order shown, and the target."""

    numbers: Pool
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.target} :"

    @property
    def split(self) -> Split:
        """By a stable hash of the sorted numbers and the target: every order of the same numbers is on one side."""
        key = f"{sorted(self.numbers)}>{self.target}"
        return "heldout" if hashlib.sha256(key.encode()).digest()[0] < _HELDOUT_OF_256 else "train"


class Move(NamedTuple):
    """One worked step ``left op right = result`` and the pool it leaves."""

    left: int
    op: str
    right: int
    result: int
    rest: Pool


def apply(left: int, op: str, right: int) -> int | None:
    """The result of one step, or None outside 0..VALUE_MAX."""
    result = left + right if op == "+" else left - right if op == "-" else left * right
    return result if 0 <= result <= VALUE_MAX else None


@lru_cache(maxsize=200_000)
def moves(pool: Pool) -> tuple[Move, ...]:
    """Every legal step from a sorted pool, each written form once."""
    found: dict[tuple[int, str, int], Move] = {}
    for i, left in enumerate(pool):
        for j, right in enumerate(pool):
            if i == j:
                continue
            for op in "+-*":
                result = apply(left, op, right)
                if result is None or (left, op, right) in found:
                    continue
                rest = [n for k, n in enumerate(pool) if k not in (i, j)]
                found[left, op, right] = Move(left, op, right, result, tuple(sorted([*rest, result])))
    return tuple(found.values())


@lru_cache(maxsize=400_000)
def reachable(pool: Pool) -> frozenset[int]:
    """Every value that the whole pool can be combined into."""
    if len(pool) == 1:
        return frozenset(pool)
    return frozenset().union(*(reachable(move.rest) for move in moves(pool)))


def draw(rng: random.Random, level: int) -> Problem:
    """One solvable problem with ``level`` numbers and a target >= 1, of either split."""
    while True:
        numbers = tuple(rng.randint(1, NUMBER_MAX) for _ in range(level))
        pool = tuple(sorted(numbers))
        while len(pool) > 1 and (steps := moves(pool)):
            pool = rng.choice(steps).rest
        if len(pool) == 1 and pool[0] >= 1:
            return Problem(numbers, pool[0])


def problems(split: Split, levels: Sequence[int], seed: int) -> Iterator[Problem]:
    """Endless problems of one split, cycling through the levels; the same seed gives the same problems.

    Raises:
        DataError: an unknown split, no level, or a level outside 2..6.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"data split={split!r} does not exist. Expected train or heldout.")
    if not levels or not all(isinstance(level, int) and 2 <= level <= 6 for level in levels):
        raise DataError(
            f"data levels={list(levels)} is no list of levels. Expected counts of numbers from 2 to 6, as [3]."
        )
    return _problems(split, tuple(levels), random.Random(f"countdown {split} {seed}"))


def _problems(split: Split, levels: Pool, rng: random.Random) -> Iterator[Problem]:
    i = 0
    while True:
        problem = draw(rng, levels[i % len(levels)])
        if problem.split == split:
            yield problem
            i += 1


def dataset(split: Split, levels: Sequence[int], count: int, seed: int, distinct: bool = False) -> Dataset:
    """``count`` problems as rows: prompt, answer (the target as text), numbers, target, level.

    ``distinct`` leaves out problems whose numbers and target came before, as an evaluation wants it.

    Raises:
        DataError: a bad split, level or count, or fewer distinct problems than asked for.
    """
    if count < 1:
        raise DataError(f"data count={count} leaves no problem. Expected at least 1.")
    rows, seen, barren = [], set(), 0
    for problem in problems(split, levels, seed):
        key = (tuple(sorted(problem.numbers)), problem.target)
        if distinct and key in seen:
            barren += 1
            if barren > 20_000:
                raise DataError(
                    f"data count={count}: only {len(rows)} distinct {split} problems found at levels {list(levels)}. "
                    "Ask for fewer, or add a level."
                )
            continue
        seen.add(key)
        barren = 0
        rows.append(
            {
                "prompt": problem.prompt,
                "answer": str(problem.target),
                "numbers": " ".join(map(str, problem.numbers)),
                "target": problem.target,
                "level": len(problem.numbers),
            }
        )
        if len(rows) == count:
            return Dataset.from_list(rows)


def demonstration(rng: random.Random, problem: Problem, noise: float) -> str:
    """A worked solution that takes a random good step, or with probability ``noise`` a random legal one.

    With noise > 0 some demonstrations miss the target: the model keeps several habits, and some errors, to learn from.
    """
    pool, steps = tuple(sorted(problem.numbers)), []
    while len(pool) > 1 and (legal := moves(pool)):
        good = [move for move in legal if problem.target in reachable(move.rest)]
        move = rng.choice(good) if good and rng.random() >= noise else rng.choice(legal)
        steps.append(f"{move.left} {move.op} {move.right} = {move.result}")
        pool = move.rest
    return " ; ".join(steps)


def solution(row: dict) -> str:
    """A right solution of a row of ``dataset``."""
    numbers = tuple(map(int, row["numbers"].split()))
    return demonstration(random.Random(0), Problem(numbers, row["target"]), noise=0.0)


def tokenizer():
    """A word-level tokenizer of the task's 43 words, padding on the left, without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
