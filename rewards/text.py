"""What a model wrote, as plain text."""

from __future__ import annotations

from collections.abc import Sequence

Completion = str | Sequence[dict]


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the last message of a chat."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "")
