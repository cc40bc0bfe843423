"""Exact checker of Countdown solutions with worked steps; independent of the code that makes the problems."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rewards.text import Completion, text_of

Verdict = Literal["ok", "parse", "pool", "arithmetic", "unused", "target"]

VALUE_MAX = 31
_STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def steps_of(text: str) -> list[tuple[int, str, int, int]] | None:
    """The worked steps ``a op b = c ; ...`` as numbers, or None when the text is anything else."""
    matches = [_STEP.fullmatch(" ".join(part.split())) for part in text.split(";")]
    if not all(matches):
        return None
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches]


def verdict(numbers: str, target: int, text: str) -> Verdict:
    """ "ok", or the first thing that is wrong with a solution.

    ``parse`` not a list of steps; ``pool`` uses a number that is not there; ``arithmetic`` a wrong or forbidden result (all
    results lie in 0..31); ``unused`` numbers are left over; ``target`` another value than asked for.
    """
    steps = steps_of(text)
    if steps is None:
        return "parse"
    pool = [int(n) for n in numbers.split()]
    for left, op, right, result in steps:
        for operand in (left, right):
            if operand not in pool:
                return "pool"
            pool.remove(operand)
        value = left + right if op == "+" else left - right if op == "-" else left * right
        if value != result or not 0 <= value <= VALUE_MAX:
            return "arithmetic"
        pool.append(result)
    if len(pool) != 1:
        return "unused"
    return "ok" if pool[0] == target else "target"


def solved(
    prompts: Sequence, completions: Sequence[Completion], numbers: Sequence[str], target: Sequence[int], **columns
) -> list[float]:
    """1.0 for a correct solution, else 0.0."""
    rows = zip(numbers, target, completions, strict=True)
    return [float(verdict(n, t, text_of(completion)) == "ok") for n, t, completion in rows]


def final_answers(texts: Sequence[str]) -> list[str | None]:
    """Each solution in one spelling, None when it does not parse: what votes and distinct answers are counted on.

    ``2 + 3`` and ``3 + 2`` are the same answer. The value reached would say nothing here: the target stands in the prompt.
    """
    return [_spelling(steps_of(text)) for text in texts]


def _spelling(steps: list[tuple[int, str, int, int]] | None) -> str | None:
    if steps is None:
        return None
    ordered = [(a, op, b, c) if op == "-" or a >= b else (b, op, a, c) for a, op, b, c in steps]
    return " ; ".join(f"{a} {op} {b} = {c}" for a, op, b, c in ordered)
