"""Does a reward tell right from wrong on the data? A parser that does not costs whole runs, and nobody sees it in a reward curve."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rewards.errors import RewardError

Reward = Callable[..., list[float]]

_RIGHT, _WRONG = 0.98, 0.02  # shares below and above which a check says that something is wrong
_SLOW = 0.5  # seconds a sample, p99
_WORST = 10


def _fraction(gold: str) -> str | None:
    if match := re.fullmatch(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold):
        return f"{match[1]}/{match[2]}"
    match = re.fullmatch(r"(\d+)/(\d+)", gold)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else None


def _big_fraction(gold: str) -> str | None:
    return gold.replace("\\frac", "\\dfrac") if "\\frac" in gold else None


def _commas(gold: str) -> str | None:
    plain = gold.replace(",", "")
    if not re.fullmatch(r"-?(?:\d{4,}|\d{1,3}(?:,\d{3})+)", gold):
        return None
    return f"{int(plain):,}" if plain == gold else plain


def _per_cent(gold: str) -> str | None:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\\?%", gold)
    return match[1] if match else None


def _units(gold: str) -> str | None:
    return f"{gold} \\text{{ cm}}" if re.fullmatch(r"-?\d+(?:\.\d+)?", gold) else None


def _decimal(gold: str) -> str | None:
    return f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else None


def _words(gold: str) -> str | None:
    return f"\\text{{{gold}}}" if re.fullmatch(r"[A-Za-z ]{2,}", gold) else None


# Other spellings of the same answer: gold -> how it is written, None where that does not apply.
SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "boxed": lambda gold: f"\\boxed{{{gold}}}",
    "boxed in a sentence": lambda gold: f"Therefore the answer is $\\boxed{{{gold}}}$. This is what was asked for.",
    "boxed with spaces": lambda gold: f"\\boxed{{ {gold} }}",
    "a/b": lambda gold: (other := _fraction(gold)) and f"\\boxed{{{other}}}",
    "\\dfrac": lambda gold: (other := _big_fraction(gold)) and f"\\boxed{{{other}}}",
    "1,000": lambda gold: (other := _commas(gold)) and f"\\boxed{{{other}}}",
    "per cent": lambda gold: (other := _per_cent(gold)) and f"\\boxed{{{other}}}",
    "units": lambda gold: (other := _units(gold)) and f"\\boxed{{{other}}}",
    "7.0": lambda gold: (other := _decimal(gold)) and f"\\boxed{{{other}}}",
    "\\text": lambda gold: (other := _words(gold)) and f"\\boxed{{{other}}}",
}


@dataclass(frozen=True)
class Sample:
    """One completion that did not get what it should."""

    row: int  # counted from 1
    case: str
    completion: str
    got: float
    expected: str


@dataclass(frozen=True)
class SelfCheck:
    """What a reward made of right, wrong and empty answers.

    Attributes:
        right: case -> (rows it applies to, share that scored 1). empty: share of empty completions that scored above 0.
        wrong: share of another row's answers that scored above 0 although the two differ; None where rows cannot be told apart.
        p50, p99: seconds for one sample alone. unparsed: share of right answers that the reward could not read, None where it
        does not say (series ``reward/unparsed``). worst: ten samples that went wrong, the first of every case first.
    """

    rows: int
    right: dict[str, tuple[int, float]]
    empty: float
    wrong: float | None
    p50: float
    p99: float
    unparsed: float | None
    worst: tuple[Sample, ...] = field(default=())

    def problems(self) -> Iterator[str]:
        """What is wrong, a sentence each: fewer than 98 % of the right answers scoring 1, more than 2 % of the others above 0,
        or half a second a sample (p99)."""
        for case, (count, share) in self.right.items():
            if share < _RIGHT:
                yield f"{share:.0%} of {count} right answers score 1 as {case!r}; expected all.{self._example(case)}"
        if self.empty > _WRONG:
            yield f"{self.empty:.0%} of the empty completions score above 0; expected none."
        if self.wrong is not None and self.wrong > _WRONG:
            yield f"{self.wrong:.0%} of another row's answers score above 0; expected none.{self._example('another row')}"
        if self.p99 > _SLOW:
            yield f"one sample takes {self.p99:.2f} s (p99), which a rollout of hundreds waits for. Make it faster, or use a pool."

    def lines(self) -> Iterator[str]:
        """The check as a readable table."""
        for case, (count, share) in self.right.items():
            yield f"{'right, as ' + case:<34}{share:7.1%} score 1    ({count} rows)"
        yield f"{'empty':<34}{self.empty:7.1%} above 0"
        if self.wrong is not None:
            yield f"{'another row' + chr(39) + 's answer':<34}{self.wrong:7.1%} above 0"
        if self.unparsed is not None:
            yield f"{'right answers that are not read':<34}{self.unparsed:7.1%}"
        yield f"{'one sample':<34}{self.p50 * 1000:7.1f} ms p50, {self.p99 * 1000:.1f} ms p99"
        for s in self.worst:
            yield f"row {s.row}, {s.case}: got {s.got:g}, expected {s.expected}: {_short(s.completion)}"

    def _example(self, case: str) -> str:
        found = next((s for s in self.worst if s.case == case), None)
        return "" if found is None else f" Row {found.row}: {_short(found.completion)} got {found.got:g}."


def check(
    reward: Reward,
    rows: Sequence[dict],
    *,
    seed: int = 0,
    limit: int = 256,
    solution: Callable[[dict], str] | None = None,
) -> SelfCheck:
    """Ask a reward about answers whose worth is known.

    Args:
        rows: with prompt, answer and whatever the reward asks for; the first ``limit`` are taken. solution: a row -> a completion
            that must score 1; None for the gold answer in a box and in other spellings.
        seed: shifts whose answer another row is given.

    Raises:
        RewardError: what the reward raised, or no row with an answer.
    """
    rows = list(rows[:limit])
    if not rows or (solution is None and "answer" not in rows[0]):
        raise RewardError(
            "a reward can only be checked on rows with an answer, or with data.solution. Map one: data.columns.answer=NAME."
        )
    spellings = SPELLINGS if solution is None else {}
    golds = [str(row.get("answer", "")) for row in rows]
    written = {name: [spell(gold) for gold in golds] for name, spell in spellings.items()}
    if solution is not None:
        written = {"the set's solution": [solution(row) for row in rows]}
    series: dict[str, float] = {}
    right, worst = {}, []
    for name, texts in written.items():
        scores = _score(reward, rows, texts, series if not right else {})
        if scores:
            right[name] = len(scores), sum(s >= 1 for s in scores.values()) / len(scores)
            worst += [Sample(i + 1, name, texts[i], s, "1") for i, s in scores.items() if s < 1]
    empty = _score(reward, rows, [""] * len(rows), {})
    worst += [Sample(i + 1, "empty", "", s, "0") for i, s in empty.items() if s > 0]
    first, shift = next(iter(written.values())), 1 + seed % max(1, len(rows) - 1)
    other = [first[(i + shift) % len(rows)] for i in range(len(rows))]
    differs = [other[i] != first[i] and _differ(rows[i], rows[(i + shift) % len(rows)]) for i in range(len(rows))]
    if solution is None:
        differs = [d and not _alike(golds[i], golds[(i + shift) % len(rows)]) for i, d in enumerate(differs)]
    wrong = _score(reward, rows, [text if d else None for text, d in zip(other, differs, strict=True)], {})
    worst += [Sample(i + 1, "another row", other[i], s, "0") for i, s in wrong.items() if s > 0]
    seconds = sorted(_seconds(reward, row, text) for row, text in zip(rows, first, strict=True))
    return SelfCheck(
        rows=len(rows),
        right=right,
        empty=sum(s > 0 for s in empty.values()) / len(empty),
        wrong=sum(s > 0 for s in wrong.values()) / len(wrong) if wrong else None,
        p50=seconds[len(seconds) // 2],
        p99=seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        unparsed=series.get("reward/unparsed"),
        worst=_first_of_each(worst),
    )


def _first_of_each(samples: list[Sample]) -> tuple[Sample, ...]:
    """The first of every case, then the second of every case, and so on."""
    seen: Counter = Counter()
    turns = []
    for sample in samples:
        turns.append((seen[sample.case], len(turns), sample))
        seen[sample.case] += 1
    return tuple(sample for _, _, sample in sorted(turns)[:_WORST])


def _score(reward: Reward, rows: list[dict], texts: list[str | None], series: dict) -> dict[int, float]:
    """Row -> reward, for the rows that have a text."""
    asked = [i for i, text in enumerate(texts) if text is not None]
    if not asked:
        return {}
    return dict(zip(asked, _call(reward, [rows[i] for i in asked], [texts[i] for i in asked], series), strict=True))


def _call(reward: Reward, rows: list[dict], texts: list[str], series: dict) -> list[float]:
    chat = not isinstance(rows[0]["prompt"], str)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    prompts = [row["prompt"] for row in rows]
    return reward(prompts=prompts, completions=completions, log_metric=series.__setitem__, **columns)


def _seconds(reward: Reward, row: dict, text: str) -> float:
    start = time.perf_counter()
    _call(reward, [row], [text], {})
    return time.perf_counter() - start


def _differ(row: dict, other: dict) -> bool:
    """Whether two problems differ by more than their prompts."""
    return {k: v for k, v in row.items() if k != "prompt"} != {k: v for k, v in other.items() if k != "prompt"}


def _alike(gold: str, other: str) -> bool:
    """Whether two golds may be the same answer, written in two ways."""
    a, b = (re.sub(r"[\s,$\\%{}]|text|frac", "", g).lower() for g in (gold, other))
    return a == b


def _short(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= width else text[: width - 3] + "...")
