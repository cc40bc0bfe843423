"""Rows of a label and a text, wrapped to 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

Row = tuple[str, str]  # the label is empty where a row goes on with the one before

WIDTH = 100
_LABEL = 18


def page(sections: Mapping[str, Iterable[Row]]) -> str:
    """Titles with their rows under them; a section without rows is left out."""
    parts = []
    for title, rows in sections.items():
        if lines := [line for label, text in rows for line in _wrapped(label, text)]:
            parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label:<{_LABEL - 2}}" if len(label) < _LABEL - 2 else f"  {label} ",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def count(n: int, what: str) -> str:
    """``1 update``, ``1,024 completions``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = list(words)
    return f"{', '.join(first)} and {last}" if first else last


def number(x: float) -> str:
    """Five digits at most, as ``1.28`` for 1 + 0.28."""
    return f"{x:.5g}"
