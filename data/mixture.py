"""Several sets as one, in shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset, concatenate_datasets

from data.errors import DataError


def order(
    sizes: Mapping[str, int], weights: Mapping[str, float], seed: int, start: int = 0
) -> Iterator[tuple[str, int]]:
    """Endless sequence of (set, row), from position ``start`` on: a pure function of its arguments, so a resumed run goes on exactly.

    After every position each set's count is within one of its share times the position: the set that is furthest behind goes
    next. Within a set a permutation, a new one for each pass, seeded by (seed, set, pass).

    Raises:
        DataError: weights that name other sets, are negative or sum to 0, or an empty set.
    """
    _check(sizes, weights)
    total = sum(weights.values())
    share = {name: weights[name] / total for name in sizes if weights[name] > 0}
    taken = dict.fromkeys(share, 0)
    passes: dict[str, tuple[int, np.ndarray]] = {}
    position = 0
    while True:
        name = max(share, key=lambda n: share[n] * (position + 1) - taken[n])
        number, row = divmod(taken[name], sizes[name])
        if passes.get(name, (-1,))[0] != number:
            rng = np.random.default_rng([seed, list(sizes).index(name), number])
            passes[name] = number, rng.permutation(sizes[name])
        taken[name] += 1
        if position >= start:
            yield name, int(passes[name][1][row])
        position += 1


def mix(sets: Mapping[str, Dataset], weights: Mapping[str, float], seed: int, size: int | None = None) -> Dataset:
    """One set of ``size`` rows (default: as many as all together) in the order of ``order``.

    The column ``source`` names each row's set; columns that not every set has are left out.

    Raises:
        DataError: as ``order``.
    """
    if not isinstance(weights, Mapping):
        raise DataError(f"data.weights={weights} is no map. Expected one, as data.weights.{next(iter(sets))}=3.")
    if size is not None and not isinstance(size, int):
        raise DataError(f"data.size={size} is no size. Expected a number above 0, or null for all rows together.")
    weights = {**dict.fromkeys(sets, 1.0), **weights}
    sizes = {name: len(data) for name, data in sets.items()}
    count = sum(sizes.values()) if size is None else size
    if count < 1:
        raise DataError(f"data.size={size} is no size. Expected a number above 0, or null for all rows together.")
    offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    picks = order(sizes, weights, seed)
    rows = [(name, offsets[name] + row) for name, row in (next(picks) for _ in range(count))]
    shared = [c for c in next(iter(sets.values())).column_names if all(c in d.column_names for d in sets.values())]
    kinds = {name: type(data[0]["prompt"]) for name, data in sets.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name}: {'text' if kind is str else 'chat'}" for name, kind in kinds.items())
        raise DataError(f"data.sets mixes prompts of two kinds ({found}). Give all of them one prompt.style.")
    whole = concatenate_datasets([data.select_columns(shared) for data in sets.values()])
    return whole.select([row for _, row in rows]).add_column("source", [name for name, _ in rows])


def _check(sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
    if set(weights) != set(sizes):
        odd = sorted(set(weights) ^ set(sizes))
        raise DataError(
            f"data.weights and data.sets differ in {', '.join(odd)}. Expected weights for: {', '.join(sizes)}."
        )
    if (
        not all(isinstance(w, int | float) and math.isfinite(w) for w in weights.values())
        or min(weights.values()) < 0
        or sum(weights.values()) <= 0
    ):
        raise DataError(
            f"data.weights={dict(weights)} are no shares. Expected numbers of at least 0, one of them above."
        )
    if empty := [name for name, size in sizes.items() if size == 0 and weights[name] > 0]:
        raise DataError(f"data.sets: {', '.join(empty)} has no rows.")
