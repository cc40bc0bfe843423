"""Text of a model or a user, for people: nothing in it acts on a page or a terminal, and nothing in it hides."""

from __future__ import annotations

_MARKS = {"\n": "\u21b5", "\t": "\u21e5"}


def visible(text: str, lines: bool = False) -> str:
    """The text with control and other unprintable characters shown. Args: lines: break them where the text does, behind the mark."""
    shown = "".join(_MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
    return shown.replace(_MARKS["\n"], _MARKS["\n"] + "\n") if lines else shown


def short(text: str, most: int, lines: bool = False) -> str:
    """:func:`visible`; of a text longer than ``most`` characters the beginning and the end."""
    half = most // 2
    return visible(text if len(text) <= most else f"{text[:half]} […] {text[-half:]}", lines)


def word(text: str) -> str:
    """A token by itself: its spaces are shown as well."""
    return visible(text).replace(" ", "\u2423") or "(empty)"
