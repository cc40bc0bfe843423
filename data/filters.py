"""Which problems are worth training on. Each filter looks at one row after the other and says why it drops it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset, IterableDataset

from data.errors import DataError
from data.prompts import Prompt, plain

Filter = Callable[[Mapping], str | None]  # a row -> why it is dropped, None to keep it

_COMMON = 0.1  # an n-gram in more than this share of the prompts of a set is its instruction, not a problem
_PHRASE = 5  # training prompts that may share an n-gram before it is a turn of phrase
_AT_LEAST = 20  # prompts a set must have for that share to mean anything


def apply(data: Dataset | IterableDataset, filters: Sequence[Filter]) -> tuple[Dataset | IterableDataset, Counter]:
    """The rows that no filter drops, and how many each reason dropped (a stream counts as it goes).

    Raises:
        DataError: no row is left.
    """
    dropped: Counter = Counter()

    def keep(row: Mapping) -> bool:
        reason = next((r for f in filters if (r := f(row)) is not None), None)
        if reason is not None:
            dropped[reason] += 1
        return reason is None

    if not filters:
        return data, dropped
    if isinstance(data, IterableDataset):

        def passing() -> Iterator[dict]:
            """Every pass over a stream begins anew: what an earlier one saw is no duplicate."""
            dropped.clear()
            for each in filters:
                if isinstance(each, Duplicates):
                    each.forget()
            yield from filter(keep, data)

        return IterableDataset.from_generator(passing), dropped
    kept = [i for i, row in enumerate(data) if keep(row)]
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"data.filter leaves none of {len(data)} rows: {reasons}. Loosen it.")
    return data.select(kept), dropped


class MaxTokens:
    """Drops prompts longer than ``limit`` tokens. ``length``: prompt -> tokens, as training counts them."""

    def __init__(self, length: Callable[[Prompt], int], limit: int):
        if not isinstance(limit, int) or limit < 1:
            raise DataError(
                f"data.filter.max_prompt_tokens={limit} drops everything. Expected a number above 0, or null."
            )
        self.length, self.limit = length, limit

    def __call__(self, row: Mapping) -> str | None:
        return f"longer than {self.limit} tokens" if self.length(row["prompt"]) > self.limit else None


class PassRate:
    """Keeps problems that a model solves neither always nor never: ``low <= pass rate <= high``.

    Args:
        rates: a parquet of ``entrl eval`` (columns prompt, correct; the rate is the mean over a prompt's samples), or None to
            read each row's own column. column: its name.

    Raises:
        DataError: low > high, outside 0..1, no such file or columns; at a row: no rate, or none between 0 and 1.
    """

    def __init__(self, low: float, high: float, *, rates: str | None = None, column: str = "pass_rate"):
        if not all(isinstance(x, int | float) for x in (low, high)) or not 0 <= low <= high <= 1:
            raise DataError(
                f"data.filter.pass_rate: low={low}, high={high} do not fit. Expected 0 <= low <= high <= 1."
            )
        self.low, self.high, self.column, self.rates = low, high, column, None
        if rates is not None:
            if not Path(rates).is_file():
                raise DataError(
                    f"data.filter.pass_rate.rates={rates} does not exist. Give the .parquet of an entrl eval."
                )
            try:
                frame = pd.read_parquet(rates, columns=["prompt", "correct"])
            except (ValueError, OSError) as error:
                raise DataError(
                    f"data.filter.pass_rate.rates={rates} cannot be read: {str(error).splitlines()[0]}. Expected columns prompt and correct."
                ) from error
            self.rates = frame.groupby("prompt")["correct"].mean().to_dict()

    def __call__(self, row: Mapping) -> str | None:
        if self.rates is not None:
            prompt = row["prompt"]
            rate = self.rates.get(prompt if isinstance(prompt, str) else prompt[-1]["content"])
            if rate is None:
                return "without a pass rate"
        else:
            rate = row.get(self.column)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise DataError(
                f"data.filter.pass_rate: column {self.column!r} is {rate!r}. Expected a share from 0 to 1; name the column in data.columns."
            )
        return None if self.low <= rate <= self.high else f"with a pass rate outside {self.low:g} to {self.high:g}"


class Duplicates:
    """Drops a problem that came before: with ``exact`` the same words, with ``near`` also one whose 5-grams overlap.

    Near means a Jaccard similarity of the sets of 5-grams of at least ``similarity``, those of the set's instruction (learnt from
    ``sample``, some of its prompts) aside. The search is exact: two sets that similar share one of their first
    ``n - ceil(similarity n) + 1`` members in any fixed order, here that of their hashes.
    """

    def __init__(self, kind: str = "exact", similarity: float = 0.8, sample: Iterable[Prompt] = ()):
        if kind not in ("exact", "near"):
            raise DataError(f"data.filter.duplicates={kind} is not known. Expected exact, near or null.")
        if not isinstance(similarity, int | float) or not 0 < similarity <= 1:
            raise DataError(
                f"data.filter.similarity={similarity} is no similarity. Expected a number above 0, up to 1."
            )
        self.near, self.similarity = kind == "near", similarity
        self._instruction = _instruction([_hashes(_words(p)) for p in sample]) if self.near else set()
        self._seen: set[tuple[str, ...]] = set()
        self._grams: list[frozenset[int]] = []
        self._index: dict[int, list[int]] = {}

    def __call__(self, row: Mapping) -> str | None:
        words = _words(row["prompt"])
        if tuple(words) in self._seen:
            return "duplicates"
        self._seen.add(tuple(words))
        if not self.near:
            return None
        grams = frozenset(_hashes(words) - self._instruction)
        return "near duplicates" if grams and self._is_near(grams) else None

    def forget(self) -> None:
        """Begin anew."""
        self._seen.clear()
        self._grams.clear()
        self._index.clear()

    def _is_near(self, grams: frozenset[int]) -> bool:
        prefix = sorted(grams)[: len(grams) - math.ceil(self.similarity * len(grams) - 1e-9) + 1]
        for i in {i for gram in prefix for i in self._index.get(gram, ())}:
            both = len(grams & self._grams[i])
            if both >= self.similarity * (len(grams) + len(self._grams[i]) - both):
                return True
        for gram in prefix:
            self._index.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)
        return False


class Decontaminate:
    """Drops problems that share n words in a row with a problem of an evaluation set; punctuation and signs aside.

    What many problems say is no problem of its own and does not count: an n-gram in more than a tenth of an evaluation set's
    prompts (its instruction), or in more than five of the training prompts in ``sample`` ("where m and n are relatively prime
    positive integers"). A problem shorter than n words is compared whole. n = 13 is GPT-3's choice (arXiv 2005.14165, appendix C).

    Args:
        sets: name -> prompts of the evaluation set. sample: training prompts.
    """

    def __init__(self, sets: Mapping[str, Iterable[Prompt]], sample: Iterable[Prompt] = (), n: int = 13):
        if not isinstance(n, int) or n < 1:
            raise DataError(f"data.filter.ngram={n} is no length. Expected a number above 0; 13 is usual.")
        self.n, self._owner = n, {}
        distinct = {frozenset(self._grams(prompt)) for prompt in sample}  # a problem that is there often is no phrase
        counts = Counter(gram for grams in distinct for gram in grams)
        for name, prompts in sets.items():
            problems = [self._grams(prompt) for prompt in prompts]
            own = _instruction(problems)
            for gram in set().union(*problems) - own:
                if counts[gram] <= _PHRASE:
                    self._owner.setdefault(gram, name)

    def _grams(self, prompt: Prompt) -> set[int]:
        words = [word for word in _words(prompt) if word[0].isalnum()]
        return set(map(hash, _ngrams(words, self.n)))

    def __call__(self, row: Mapping) -> str | None:
        owner = next((self._owner[gram] for gram in self._grams(row["prompt"]) if gram in self._owner), None)
        return None if owner is None else f"in common with {owner}"


def _instruction(prompts: Sequence[set[int]]) -> set[int]:
    """The n-grams of what a set says in front of or behind every problem."""
    if len(prompts) < _AT_LEAST:
        return set()
    counts = Counter(gram for grams in prompts for gram in grams)
    return {gram for gram, count in counts.items() if count > _COMMON * len(prompts)}


def _words(prompt: Prompt) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", plain(prompt).lower())


def _hashes(words: Sequence[str]) -> set[int]:
    return set(map(hash, _ngrams(words, 5)))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
