"""Does a completion have the form that was asked for?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.errors import RewardError
from rewards.text import Completion, text_of


def format_tags(
    prompts: Sequence, completions: Sequence[Completion], tags: Sequence[str] = ("think", "answer"), **columns
) -> list[float]:
    """1.0 where the text is exactly ``<a>...</a>`` for each tag in order with nothing between, else 0.0.

    White space around the tags is free; a tag may not open or close twice.

    Raises:
        RewardError: tags that are no list of names.
    """
    if isinstance(tags, str) or not tags or not all(isinstance(t, str) and t for t in tags):
        raise RewardError(
            f"reward.format_tags.fn.tags={tags!r} does not work. Expected a list of names, as [think,answer]."
        )
    pattern = re.compile(
        r"\s*" + r"\s*".join(rf"<{re.escape(t)}>.*?</{re.escape(t)}>" for t in tags) + r"\s*", re.DOTALL
    )
    return [float(_once(text_of(c), tags) and pattern.fullmatch(text_of(c)) is not None) for c in completions]


def _once(text: str, tags: Sequence[str]) -> bool:
    return all(text.count(f"<{t}>") == 1 and text.count(f"</{t}>") == 1 for t in tags)
