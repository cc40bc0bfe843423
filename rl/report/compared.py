"""Methods side by side: their numbers with intervals, every pair tested, and what a reader must know to believe them."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rl.report import stats
from rl.report.measures import ALL_SETS, Heldout, heldout, measures, problem_interval
from rl.report.methods import Method, group
from rl.report.reading import Run
from rl.report.stats import Interval, PValue

MOST = 10  # methods of which every pair is tested: of many more pairs, corrected for all, none could come out
FEW = 5  # below so many seeds a bootstrap interval is too narrow, and no sign-flip test reaches 5 %


class Cell(NamedTuple):
    """A measure of a method: interquartile mean of ``runs`` runs, and what its interval is over (None: there is no interval)."""

    value: float
    low: float
    high: float
    runs: int
    over: Literal["seeds", "problems"] | None


@dataclass(frozen=True)
class Result:
    """A method with its numbers.

    Attributes:
        letter: short name. measures: of each run, by its folder. used: the runs behind the numbers: the finished ones, all that got anywhere where none is.
        problems: held-out problems that all used runs answered; rates: share of right samples of each, averaged over the runs;
        curves: unbiased pass@k of each (problems, ks), averaged over the runs. Empty where no samples were kept.
    """

    letter: str
    method: Method
    used: Sequence[Run]
    finished: bool
    measures: Mapping[Path, Mapping[str, float]]
    cells: Mapping[str, Cell]
    problems: list[tuple[str, int]] = field(default_factory=list)
    rates: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ks: Sequence[int] = ()
    curves: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def rows(self, problems: list[tuple[str, int]]) -> np.ndarray:
        """Where these problems are in ``rates`` and ``curves``."""
        where = {problem: i for i, problem in enumerate(self.problems)}
        return np.array([where[problem] for problem in problems], dtype=int)


class Crossover(NamedTuple):
    """The k from which ``overtaker``, behind or equal at k = 1, is ahead in pass@k; infinity: not up to ``upto`` samples."""

    overtaker: str
    k: float
    low: float
    high: float
    upto: int


@dataclass(frozen=True)
class Pair:
    """``b`` minus ``a`` in pass@1 (letters), None where it cannot be said.

    Attributes:
        difference, test: over the ``problems`` held-out problems of both, seeds averaged; holm: its p-value corrected for all pairs compared.
        seeds: the seeds that both have; seeds_test: over them, where there are at least five. improvement: P(a run of b is better),
            where both have several runs.
    """

    a: str
    b: str
    problems: int = 0
    difference: Interval | None = None
    test: PValue | None = None
    holm: float | None = None
    seeds: Sequence[int] = ()
    seeds_test: PValue | None = None
    seeds_holm: float | None = None
    improvement: Interval | None = None
    crossover: Crossover | None = None


@dataclass(frozen=True)
class Comparison:
    """All of it; ``before``: pass@k before training, by what to call it, as (ks, values)."""

    results: Sequence[Result]
    pairs: Sequence[Pair]
    names: Sequence[str]
    before: Mapping[str, tuple[Sequence[int], np.ndarray]]
    notes: Sequence[str]


def compare(runs: Sequence[Run], notes: Sequence[str] = ()) -> Comparison:
    """Group runs to methods and compare them; ``notes`` of the reading come first in those of the comparison."""
    results = [_result(letter(i), method) for i, method in enumerate(group(runs))]
    names = list(dict.fromkeys(name for r in results for name in r.cells))
    if len(results) > MOST:
        chosen = [(results[0], other) for other in results[1:]]
        notes = [
            *notes,
            f"More than {MOST} methods: each is tested against {results[0].letter}, the first that was named.",
        ]
    else:
        chosen = list(combinations(results, 2))
    pairs = _corrected([_pair(a, b) for a, b in chosen])
    return Comparison(
        results=results,
        pairs=pairs,
        names=sorted(names, key=_order(names)),
        before=_before(results),
        notes=[*notes, *_notes(results, pairs)],
    )


def letter(i: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    return letters[i] if i < 26 else letter(i // 26 - 1) + letters[i % 26]


def ks_up_to(n: int) -> list[int]:
    """Every k up to 32, then about 8 a doubling, and n."""
    return sorted({*range(1, min(n, 32) + 1), *(k for i in range(80) if (k := round(32 * 2 ** (i / 8))) < n), n})


def _order(names: Sequence[str]):
    """Names as the runs brought them, pass@k by k before maj@k before the rest."""

    def key(name: str) -> tuple:
        kind, at, k = name.partition("@")
        if at and k.isdigit():
            return 1, kind != "pass", int(k)
        return (0 if name == "pass@1 before" else 2, names.index(name), 0)

    return key


def _result(letter: str, method: Method) -> Result:
    found = {run.folder: measures(run) for run in method.runs}
    done = [run for run in method.runs if run.state == "done"]
    used = done or [run for run in method.runs if found[run.folder]]
    cells = {}
    for name in dict.fromkeys(name for run in used for name in found[run.folder]):
        having = [run for run in used if name in found[run.folder]]
        cells[name] = _cell(name, having, np.array([[found[run.folder][name]] for run in having]))
    if len(scores := _sets(used, found)) and scores.shape[1] > 1:
        cells[ALL_SETS] = _cell(ALL_SETS, used, scores)
    samples = [held for run in used if (held := heldout(run))]
    return Result(letter, method, used, bool(done), found, cells, **_on_problems(samples))


def _cell(name: str, runs: Sequence[Run], scores: np.ndarray) -> Cell:
    interval = stats.over_runs(scores)
    if len(scores) > 1:
        return Cell(*interval, len(scores), "seeds")
    problems = problem_interval(runs[0], name)
    return Cell(interval.value, *(problems or (np.nan, np.nan)), 1, "problems" if problems else None)


def _sets(used: Sequence[Run], found: Mapping[Path, Mapping[str, float]]) -> np.ndarray:
    """pass@1 as (runs, sets) of the runs that have every set; of a single set, that one."""
    sets = list(dict.fromkeys(name for run in used for name in found[run.folder] if name.startswith("pass@1 of ")))
    names = sets or ["pass@1"]
    rows = [
        [found[run.folder][name] for name in names] for run in used if all(name in found[run.folder] for name in names)
    ]
    return np.array(rows).reshape(-1, len(names))


def _on_problems(samples: Sequence[Heldout]) -> dict:
    if not samples:
        return {}
    shared = set.intersection(*(set(s.problems) for s in samples))
    problems = [problem for problem in samples[0].problems if problem in shared]
    right = [s.right if s.problems == problems else s.on(problems) for s in samples]
    ks = ks_up_to(min(s.n for s in samples))
    curves = [stats.pass_curves(r, s.n, ks) for r, s in zip(right, samples, strict=True)]
    rates = [r / s.n for r, s in zip(right, samples, strict=True)]
    return {"problems": problems, "rates": np.mean(rates, axis=0), "ks": ks, "curves": np.mean(curves, axis=0)}


def _pair(a: Result, b: Result) -> Pair:
    seeds, seeds_test = _over_seeds(a, b)
    scores = [_sets(r.used, r.measures) for r in (a, b)]
    comparable = min(map(len, scores)) > 1 and scores[0].shape[1] == scores[1].shape[1]
    pair = {
        "seeds": seeds,
        "seeds_test": seeds_test,
        "improvement": stats.improvement(scores[1], scores[0]) if comparable else None,
    }
    rows = slice(None), slice(None)
    problems = a.problems
    if a.problems != b.problems:
        problems = sorted(set(a.problems) & set(b.problems))
        rows = a.rows(problems), b.rows(problems)
    if not problems:
        return Pair(a.letter, b.letter, **pair)
    difference = b.rates[rows[1]] - a.rates[rows[0]]
    return Pair(
        a.letter,
        b.letter,
        problems=len(problems),
        difference=stats.over_problems(difference),
        test=stats.sign_flip(difference),
        crossover=_crossover(a, b, rows),
        **pair,
    )


def _over_seeds(a: Result, b: Result) -> tuple[list[int], PValue | None]:
    """The seeds of both, and the test over them; several runs of a method and seed are averaged."""
    scores = []
    for result in (a, b):
        by_seed: dict[int, list[float]] = {}
        for run in result.used:
            if "seed" in run.config and "pass@1" in result.measures[run.folder]:
                by_seed.setdefault(run.config["seed"], []).append(result.measures[run.folder]["pass@1"])
        scores.append({seed: float(np.mean(values)) for seed, values in by_seed.items()})
    seeds = sorted(scores[0].keys() & scores[1].keys())
    if len(seeds) < FEW:
        return seeds, None
    return seeds, stats.sign_flip(np.array([scores[1][s] - scores[0][s] for s in seeds]))


def _crossover(a: Result, b: Result, rows: tuple) -> Crossover | None:
    """None with a single k."""
    ks = sorted(set(a.ks) & set(b.ks))
    if len(ks) < 2:
        return None
    curves = [r.curves[row][:, [r.ks.index(k) for k in ks]] for r, row in zip((a, b), rows, strict=True)]
    behind = 0 if curves[0][:, 0].mean() < curves[1][:, 0].mean() else 1
    found = stats.crossover(curves[1 - behind], curves[behind], ks)
    return Crossover((a, b)[behind].letter, *found, upto=ks[-1])


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with Holm's p-values, over all pairs of the comparison."""
    out = list(pairs)
    for test, field_name in (("test", "holm"), ("seeds_test", "seeds_holm")):
        tested = [i for i, pair in enumerate(out) if getattr(pair, test)]
        for i, p in zip(tested, stats.holm([getattr(out[i], test).p for i in tested]), strict=True):
            out[i] = replace(out[i], **{field_name: p})
    return out


def _before(results: Sequence[Result]) -> dict[str, tuple[Sequence[int], np.ndarray]]:
    """pass@k before training of each method's first run, once where it is the same."""
    found: list[tuple[list[str], Sequence[int], np.ndarray]] = []
    for result in results:
        held = heldout(result.used[0], "before") if result.used else None
        if held is None:
            continue
        ks = ks_up_to(held.n)
        values = stats.pass_curves(held.right, held.n, ks).mean(axis=0)
        same = next((f for f in found if list(f[1]) == ks and np.allclose(f[2], values)), None)
        if same:
            same[0].append(result.letter)
        else:
            found.append(([result.letter], ks, values))
    return {
        "before training" if len(found) == 1 else f"before training, {', '.join(letters)}": (ks, values)
        for letters, ks, values in found
    }


def _and_more(letters: Sequence[str], shown: int = 10) -> str:
    return ", ".join(letters[:shown]) + (f" and {len(letters) - shown} more" if len(letters) > shown else "")


def _notes(results: Sequence[Result], pairs: Sequence[Pair]) -> list[str]:
    notes = []
    for result in results:
        others = [run for run in result.method.runs if result.finished and run.state != "done"]
        if others:
            states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in others).items())
            notes.append(f"{result.letter}: left out of the numbers, because not finished: {states}.")
        if not result.finished:
            notes.append(f"{result.letter}: no run has finished; the numbers are of what there is.")
        early = [run for run in result.used if run.summary.get("stopped_by")]
        if early:
            notes.append(f"{result.letter}: {len(early)} of {len(result.used)} runs ended early, by an alarm.")
        repeated = [s for s, n in Counter(run.config.get("seed") for run in result.used).items() if n > 1]
        if repeated:
            notes.append(f"{result.letter}: several runs with seed {', '.join(map(str, repeated))}.")
    single = [r.letter for r in results if len(r.used) == 1]
    if single:
        notes.append(
            f"{_and_more(single)}: one run, so nothing is known of other seeds. Intervals marked p are over held-out problems."
        )
    few = [r.letter for r in results if 1 < len(r.used) < FEW]
    if few:
        notes.append(
            f"{_and_more(few)}: fewer than {FEW} seeds. Their intervals are too narrow (of 3 seeds, 95 % cover about 3 times in 4): "
            "read them as a spread."
        )
    if any(pair.test for pair in pairs):
        notes.append(
            "The test over problems asks whether these runs differ on problems like these; other seeds may come out otherwise."
        )
    lengths = {int(run.metrics.index[-1]) for r in results for run in r.used if len(run.metrics)}
    if len(lengths) > 1:
        notes.append(
            f"Runs have {min(lengths)} to {max(lengths)} steps: each is measured at its own end, and a method's curve ends with its "
            "shortest run."
        )
    without = [r.letter for r in results if not r.problems]
    if without:
        notes.append(
            f"{_and_more(without)}: no samples of an evaluation after training (eval/after.parquet), so no curve of pass@k and no "
            "test over problems."
        )
    asked = {r.letter: len(r.problems) for r in results if r.problems}
    if any(p.problems < max(asked[p.a], asked[p.b]) for p in pairs if {p.a, p.b} <= asked.keys()):
        notes.append(
            "Not all methods were evaluated on the same held-out problems; pairs are compared on those they share."
        )
    return notes
