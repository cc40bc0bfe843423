"""Is the final answer of a mathematical text equal to the gold answer? By math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rewards.text import Completion, text_of

# math-verify's own timeouts use SIGALRM, which only a main thread may set; rewards also run in worker threads.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_CONFIG = (LatexExtractionConfig(), ExprExtractionConfig())


def math_answer(prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns) -> list[float]:
    """1.0 where the last answer in the completion equals the gold ``answer``, else 0.0; what cannot be parsed scores 0."""
    return [float(equal(gold, text_of(c))) for gold, c in zip(answer, completions, strict=True)]


def equal(gold: str, text: str) -> bool:
    """Whether the last answer in ``text`` is mathematically equal to ``gold``."""
    found = _parse(text)
    return bool(found) and bool(verify(list(_gold(str(gold))), list(found), timeout_seconds=None))


def final_answers(texts: Sequence[str]) -> list[str | None]:
    """The last answer of each text in math-verify's canonical spelling, None when there is none."""
    return [str(found[0]) if (found := _parse(text)) else None for text in texts]


@lru_cache(maxsize=4096)
def _gold(gold: str) -> tuple:
    marked = gold if "$" in gold or r"\boxed" in gold else f"${gold}$"  # bare LaTeX is only read between dollars
    return _parse(marked) or _parse(gold) or (gold,)


def _parse(text: str) -> tuple:
    return tuple(parse(text, extraction_config=_CONFIG, parsing_timeout=None))
