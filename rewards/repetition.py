"""A penalty for saying the same thing again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rewards.text import Completion, text_of
from rewards.values import choice, number, whole


class Repetition:
    """``-max_penalty * (1 - different n-grams / all n-grams)`` of a completion; 0.0 for one with fewer than n pieces.

    Words are lower-cased and split at white space. Source: the repetition penalty of open-r1, after "Demystifying Long
    Chain-of-Thought Reasoning" (arXiv 2502.03373, app. C.2). Differs: that paper charges each repeated token, open-r1 and this
    the completion as a whole; open-r1 writes the penalty as a negative number.

    Args:
        n: length of the n-grams. max_penalty: what an endless repetition costs, from 0. by: "words", or "tokens" of the model's
            tokenizer, which also works for languages without spaces.

    Raises:
        RewardError: a value that does not work.
    """

    __name__ = "repetition"

    def __init__(self, n: int = 3, max_penalty: float = 1.0, by: Literal["words", "tokens"] = "words"):
        whole("reward.repetition.fn.n", n, 1)
        number("reward.repetition.fn.max_penalty", max_penalty, 0)
        choice("reward.repetition.fn.by", by, ("words", "tokens"))
        self.n, self.max_penalty, self.by = n, max_penalty, by

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        **columns,
    ) -> list[float]:
        if self.by == "tokens":
            pieces = completion_ids
        else:
            pieces = [text_of(completion).lower().split() for completion in completions]
        return [-self.max_penalty * repeated(p, self.n) for p in pieces]


def repeated(pieces: Sequence, n: int) -> float:
    """Share of the n-grams that occurred before, in [0, 1); 0.0 without an n-gram."""
    grams = list(zip(*(pieces[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
