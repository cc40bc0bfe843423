"""Is the final answer of a mathematical text equal to the gold answer? By math-verify, in processes that can be killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rewards.math_grading import answer_all, grade_all
from rewards.pool import Failed, run
from rewards.text import Completion, text_of

log = logging.getLogger("entrl.rewards")
_TOLD = 3  # failures of one call that are logged by name


def math_answer(
    prompts: Sequence,
    completions: Sequence[Completion],
    answer: Sequence[str],
    *,
    strict: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns,
) -> list[float]:
    """1.0 where the last answer in the completion equals the gold ``answer``, else 0.0; what cannot be read scores 0.

    The answer is what stands in the last ``\\boxed{}``, else in ``<answer>``, else behind "Answer:", else the last formula or
    number. Series: ``reward/unparsed``, share of completions without an answer that can be read; ``reward/timeouts``, share of
    those whose grading was given up.

    Args:
        strict: only ``\\boxed{}`` counts. timeout: seconds a completion may take. workers: processes, None for the cores of this
            machine shared by the ranks on it.
    """
    samples = [(str(gold), text_of(c), strict) for gold, c in zip(answer, completions, strict=True)]
    grades = run(grade_all, samples, timeout=timeout, workers=workers)
    lost = _tell(grades, [text for _, text, _ in samples], timeout)
    if log_metric is not None and grades:
        unparsed = sum(isinstance(g, Failed) or not g.parsed for g in grades)
        log_metric("reward/unparsed", unparsed / len(grades))
        log_metric("reward/timeouts", lost / len(grades))
    return [0.0 if isinstance(g, Failed) else g.score for g in grades]


def final_answers(
    texts: Sequence[str], *, strict: bool = False, timeout: float = 5.0, workers: int | None = None
) -> list[str | None]:
    """The last answer of each text in one spelling, None where there is none or reading it was given up."""
    found = run(answer_all, [(text, strict) for text in texts], timeout=timeout, workers=workers)
    return [None if isinstance(answer, Failed) else answer for answer in found]


def matches(texts: Sequence[str], labels: Sequence[str]) -> list[float]:
    """1.0 where the answer of a text equals its label, in whatever spelling: TTRL's own comparison of votes and labels."""
    return math_answer(texts, texts, labels)


def _tell(results: Sequence, texts: Sequence[str], timeout: float) -> int:
    """Log the first failures of a call; how many there are."""
    lost = [(i, r.why) for i, r in enumerate(results) if isinstance(r, Failed)]
    reasons = {"timeout": f"took more than {timeout:g} s", "died": "killed its worker", "raised": "failed"}
    for i, why in lost[:_TOLD]:
        log.warning("math_answer: sample %d %s and scores 0: ...%s", i, reasons[why], " ".join(texts[i][-80:].split()))
    if len(lost) > _TOLD:
        log.warning("math_answer: %d more samples were given up.", len(lost) - _TOLD)
    return len(lost)
