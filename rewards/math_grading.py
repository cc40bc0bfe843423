"""Is the answer in a text mathematically equal to a gold answer? In one process, without any protection: see ``rewards.pool``."""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# math-verify's own timeouts use SIGALRM, which only a main thread may set; the pool kills from outside
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_CONFIG = (LatexExtractionConfig(), ExprExtractionConfig())
_TAIL = 10_000  # characters at the end of a text that are read: an answer stands at the end
_LONGEST = 2_000  # characters of an answer
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"\banswer[ \t*]*[:=][ \t*]*", re.IGNORECASE)
_TINY = 1e-3  # below, numbers are compared exactly
_SCALE = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)s?\b", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# a number and words behind it that do not change its value
_NUMBER_AND_UNIT = re.compile(
    rf"({_NUMBER.pattern})\s+(?!(?:or|and|to|mod|times|plus|minus|squared|cubed|pi|factorial)\b)[A-Za-z]{{2,}}(?: [A-Za-z]+)*"
)


class Grade(NamedTuple):
    """1.0 for a right answer, else 0.0; whether there was an answer that could be read."""

    score: float
    parsed: bool


def grade_all(samples: list[tuple[str, str, bool]]) -> list[Grade]:
    """A grade for each (gold answer, text, strict)."""
    return [_safely(grade, sample, Grade(0.0, False)) for sample in samples]


def answer_all(samples: list[tuple[str, bool]]) -> list[str | None]:
    """The canonical answer of each (text, strict)."""
    return [_safely(canonical, sample, None) for sample in samples]


def _safely(work, sample, otherwise):
    try:
        return work(*sample)
    except Exception:  # sympy has a hundred ways to fail on what models write
        return otherwise


def grade(gold: str, text: str, strict: bool = False) -> Grade:
    """Whether the last answer in ``text`` equals ``gold``: the same once spelt alike, or equal by math-verify."""
    gold = _joined(gold)
    answer = extract(text, strict)
    if answer is not None:
        if bool(_SCALE.search(answer)) != bool(_SCALE.search(gold)):
            return Grade(0.0, True)  # math-verify takes the words of 18 thousand for a unit
        if _NUMBER.fullmatch(gold) and (number := _NUMBER_AND_UNIT.fullmatch(answer)):
            answer = number[1]
        if spelling(answer) == spelling(gold):
            return Grade(1.0, True)
        a, b = _number(gold), _number(answer)
        if a is not None and b is not None and (a == b or abs(a) < _TINY):
            return Grade(float(a == b), True)  # math-verify's six decimals leave nothing of 1e-7
        found = read_alone(answer)
    else:
        found = () if strict else _parse(text[-_TAIL:])
    right = bool(found) and bool(verify(list(_gold(gold)), list(found), timeout_seconds=None))
    return Grade(float(right), bool(found))


def canonical(text: str, strict: bool = False) -> str | None:
    """The last answer of a text as math-verify writes it, else as ``spelling`` does; None when there is none."""
    answer = extract(text, strict)
    if answer is None and strict:
        return None
    if answer is not None and re.fullmatch(r"[a-z]{3,}", word := spelling(answer)):
        return word  # math-verify would read a product of letters
    found = _parse(text[-_TAIL:]) if answer is None else read_alone(answer)
    if found:
        return str(found[0])
    return None if answer is None else spelling(answer) or None


def extract(text: str, strict: bool = False) -> str | None:
    """What a text says its answer is: in the last ``\\boxed{}``; unless strict also in ``<answer>``, or behind "Answer:".

    None when nothing is marked as the answer.
    """
    if (inside := _boxed(text)) is not None or strict:
        return inside
    tail = text[-_TAIL:]
    said = [tail[mark.end() :].split("\n", 1)[0] for mark in list(_SAID.finditer(tail))[-1:]]
    for marked in (_TAGGED.findall(tail), said):
        if marked and (answer := _joined(marked[-1]).strip().rstrip(".")):
            return answer[:_LONGEST]
    return None


def _boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` or ``\\fbox{...}``, braces matched; None without one that is closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start : start + _LONGEST].split("d" if text[start + 1] == "b" else "x", 1)[1].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split("\n")[0].strip() or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _joined(rest[1:i]).strip()
    return None


def _joined(answer: str) -> str:
    """Several answers in formulas of their own, ``2$, $3``, as one list."""
    return re.sub(r"\$\s*(,|and|or)\s*\$", ", ", answer)


_DROPPED = re.compile(r"\\left|\\right|\\[,;:! ]|\\(?:displaystyle|limits|quad|qquad)\b|\\\$|\$|\s|~|^\\[(\[]|\\[)\]]$")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|rm|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree|°")
_SHORT = re.compile(r"\\frac(?:(\d)(\d)|(\d)\{([^{}]+)\}|\{([^{}]+)\}(\d))")
_SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)(?:[eE]|\\times10\^)\{?([+-]?\d+)\}?")
_SLASH = re.compile(r"(-?)(\d+)/(\d+)")


def spelling(answer: str) -> str:
    """One spelling for the many of the same answer: white space, sizes of brackets and fractions, text commands, dollars, degrees
    and per cent signs, commas in numbers, a final full stop. What is spelt alike is equal; what is not may be equal all the same."""
    text = _WRAPPED.sub(r"\1", answer)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _DEGREES.sub("", text).replace("\\%", "").replace("%", "")
    text = re.sub(r"(?<=\d) +(?=\d)", "_", text)  # 1 2 is not 12
    text = _DROPPED.sub("", text)
    text = text.replace("−", "-").replace("\\cdot", "\\times").rstrip(".")
    text = _SHORT.sub(_whole_fraction, text)
    if match := _SLASH.fullmatch(text):
        text = f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if match := _SCIENTIFIC.fullmatch(text):
        return f"{float(match[1])}e{int(match[2])}"
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"-?\d+\.0+", text):
        text = text.split(".")[0]
    if re.fullmatch(r"-?\.\d+", text):
        text = text.replace(".", "0.")
    return text.lower() if text.isalpha() and len(text) > 2 else text


def _number(answer: str) -> Decimal | None:
    """The exact value of a plain or a scientific number."""
    spelt = spelling(answer)
    return Decimal(spelt) if re.fullmatch(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", spelt) else None


def is_read(gold: str) -> bool:
    """Whether math-verify makes more than a string of an answer."""
    return any(not isinstance(found, str) for found in read_alone(gold))


def _whole_fraction(match: re.Match) -> str:
    above, below = [group for group in match.groups() if group is not None]
    return f"\\frac{{{above}}}{{{below}}}"


@lru_cache(maxsize=8192)
def _gold(gold: str) -> tuple:
    return read_alone(gold) or (gold,)


def read_alone(answer: str) -> tuple:
    """An answer that stands alone; bare LaTeX is only read between dollars."""
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return _parse(marked) or _parse(answer)


def _parse(text: str) -> tuple:
    return tuple(parse(text, extraction_config=_CONFIG, parsing_timeout=None))
