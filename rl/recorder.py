"""Completions with everything known of each token, as parquet: one row a completion, lists over its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

# What pyarrow could not tell from rows that are empty, and lists of four bytes an entry where it would take eight.
_TYPES = {
    "token_ids": pa.list_(pa.int32()),
    "tokens": pa.list_(pa.string()),
    "rank": pa.list_(pa.int32()),
    "top_ids": pa.list_(pa.list_(pa.int32())),
    "top_tokens": pa.list_(pa.list_(pa.string())),
    "top_probs": pa.list_(pa.list_(pa.float32())),
    "kept": pa.list_(pa.bool_()),
    **dict.fromkeys(("entropy", "logp", "old_logp", "logp_after", "weight", "shaped"), pa.list_(pa.float32())),
}


class Told(NamedTuple):
    """Token ids of a prompt and its completion, and which of the completion's tokens are trainable."""

    prompt: list[int]
    completion: list[int]
    trainable: list[bool]


class Recorder:
    """Writes ``rollouts/step_000010.parquet``; :mod:`rl.recording` says what a row holds.

    Args:
        folder: where to write, created when needed. every: record every so many steps, and the first; 0: never. max_rows:
            completions a step, of all ranks together. alternatives: so many of the likeliest words in each token's place.
    """

    def __init__(self, folder: Path, *, every: int, max_rows: int, alternatives: int = 5):
        self.folder, self.every, self.alternatives = Path(folder), every, alternatives
        self.of_all = self.max_rows = max_rows
        self.rank = 0
        self._step, self._rows = 0, []

    def share(self, rank: int, rows: int) -> None:
        """Several processes record ``rows`` completions a step each: those above 0 write what is left of ``max_rows`` by those
        before them, as ``step_000010.rank1.parquet``, so that together it is the first groups."""
        self.rank, self.max_rows = rank, max(0, self.of_all - rank * rows)

    def due(self, step: int) -> bool:
        """Whether the rollouts of this step are recorded."""
        return self.every > 0 and (step == 1 or step % self.every == 0)

    def add(self, step: int, row: dict[str, Any], told: Told) -> None:
        """One more completion of a step, in any order; the step before is let go of."""
        if step != self._step:
            self._step, self._rows = step, []
        self._rows.append((row, told))

    def told(self, step: int) -> list[Told]:
        """The tokens of what is going to be written, as far as it is known: the first groups, up to ``max_rows`` rows."""
        if step != self._step:
            return []
        # rows arrive shuffled, and whole groups are what a reader wants to compare
        self._rows.sort(key=lambda each: (each[0]["group"], each[0]["completion"]))
        del self._rows[self.max_rows :]
        return [told for _, told in self._rows]

    def note(self, column: str, values: Sequence[Any]) -> None:
        """Set a column, a value for each of the last :meth:`told`."""
        for (row, _), value in zip(self._rows, values, strict=True):
            row[column] = value

    def write(self, step: int) -> None:
        """Write a step's file, where anything was recorded of it."""
        if not self.told(step):
            return
        suffix = f".rank{self.rank}" if self.rank else ""
        write_rows(self.folder / f"step_{step:06d}{suffix}.parquet", [row for row, _ in self._rows])

    def sample(self, count: int) -> list[dict]:
        """A few rows of the last recorded step, best and worst reward first, for people to read."""
        rows = sorted((row for row, _ in self._rows), key=lambda row: (-row["reward"], -row["group"]))
        count = min(count, len(rows))
        best = (count + 1) // 2
        return rows[:best] + rows[len(rows) - (count - best) :][::-1]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as parquet, whole or not at all; what a row lacks is null."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({c: pa.array([row.get(c) for row in rows], type=_TYPES.get(c)) for c in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
