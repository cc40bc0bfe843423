"""Which columns a set must have, and what a usable row is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import DataError

Columns = Mapping[str, str | Sequence[str] | None]  # None: this column is not wanted

_MISSING = object()
_LISTED = 20  # bad rows of one reason, and reasons, that a message names


def resolve(path: str, columns: Columns, row: dict) -> dict[str, str]:
    """Our column -> the first of its candidates that the row has.

    Dots reach into nested fields (``reward_model.ground_truth``), numbers into lists (``final_answer.0``).

    Raises:
        DataError: columns without any candidate, all of them in one sentence with those present.
    """
    found, missing = {}, []
    for ours, theirs in columns.items():
        if theirs is None:
            continue
        candidates = [theirs] if isinstance(theirs, str) else list(theirs)
        hit = next((c for c in candidates if reach(row, c) is not _MISSING), None)
        if hit is None:
            missing.append(f"{' or '.join(map(repr, candidates))} for {ours!r}")
        else:
            found[ours] = hit
    if missing:
        keys = ", ".join(f"data.columns.{entry.rsplit(' ', 1)[-1][1:-1]}" for entry in missing)
        raise DataError(
            f"data path={path} has no column {'; none '.join(missing)}. Present: {', '.join(_present(row))}. "
            f"Set {keys} to one of them."
        )
    return found


def reach(row: Any, dotted: str) -> Any:
    """The value at a dotted name, or a private mark where there is none."""
    if isinstance(row, dict) and dotted in row:
        return row[dotted]
    for part in dotted.split("."):
        if isinstance(row, dict) and part in row:
            row = row[part]
        elif isinstance(row, list) and part.isdigit() and int(part) < len(row):
            row = row[int(part)]
        else:
            return _MISSING
    return row


def pick(row: dict, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names; what is not there is None."""
    values = {ours: reach(row, theirs) for ours, theirs in columns.items()}
    return {ours: None if value is _MISSING else value for ours, value in values.items()}


def flaw(row: Mapping[str, Any], max_chars: int) -> str | None:
    """What makes a row unusable, as the end of a sentence; None for a good one.

    A prompt is text or a list of messages with a role and a content, not empty, and no longer than ``max_chars``. An answer,
    where the set has one, is text or a number.
    """
    if "prompt" in row and (reason := _prompt_flaw(row["prompt"], max_chars)):
        return reason
    if "answer" in row:
        answer = row["answer"]
        if answer is None:
            return "answer is null"
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            return f"answer is a {type(answer).__name__}, expected text or a number"
        if not str(answer).strip():
            return "answer is empty"
        if answer != answer:
            return "answer is not a number (NaN)"
    return next((f"{k} holds a lone surrogate, no valid UTF-8" for k, v in row.items() if _is_broken(v)), None)


def _prompt_flaw(prompt: Any, max_chars: int) -> str | None:
    if prompt is None:
        return "prompt is null"
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, list) and prompt:
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
                return f"prompt has a message that is no {{role, content}}: {str(message)[:60]}"
        if _is_broken("".join(message["content"] for message in prompt)):
            return "prompt holds a lone surrogate, no valid UTF-8"
        text = "".join(message["content"] for message in prompt if message["role"] != "system")
    else:
        return (
            f"prompt is {'an empty list' if prompt == [] else f'a {type(prompt).__name__}'}, expected text or messages"
        )
    if not text.strip():
        return "prompt is empty"
    if len(text) > max_chars:
        return f"prompt has {len(text):,} characters, more than data.max_prompt_chars={max_chars:,}"
    return None


def _is_broken(value: Any) -> bool:
    """Text that cannot be written: JSON may carry half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def report(path: str, bad: Sequence[tuple[int, str]], total: int) -> str:
    """One sentence on the bad rows of a set, by number."""
    by_reason: dict[str, list[int]] = {}
    for number, reason in bad:
        by_reason.setdefault(reason, []).append(number)
    named = "; ".join(f"{_rows(numbers)}: {reason}" for reason, numbers in list(by_reason.items())[:_LISTED])
    more = f"; and {len(by_reason) - _LISTED} more reasons" if len(by_reason) > _LISTED else ""
    return f"data path={path} has {len(bad)} bad of {total} rows (counted from 1): {named}{more}"


def _rows(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return f"rows {', '.join(map(str, numbers[:_LISTED]))}{more}"


def _present(row: Any, prefix: str = "") -> list[str]:
    """Names of all columns, nested ones dotted."""
    names = []
    for key, value in row.items():
        nested = _present(value, f"{prefix}{key}.") if isinstance(value, dict) else []
        names += nested or [f"{prefix}{key}"]
    return names
