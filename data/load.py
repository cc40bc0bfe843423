"""Problem sets from the hub, or from local JSONL, JSON or parquet files, under entrl's column names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets

from data.errors import DataError
from data.prompts import PromptFormat, plain
from data.read import Row, first_line, local_files, rows
from data.schema import Columns, flaw, pick, reach, report, resolve

_EXAMPLES = {
    "columns": "{prompt: question}",
    "where": "{level: [Level 4, Level 5]}",
    "splits": "{train: train, heldout: test}",
}
_CHUNK = 10_000  # rows that are Python objects at a time

log = logging.getLogger("entrl.data")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a set's problems are and how its rows become prompts.

    Args:
        path: hub id, or a local file or folder of .jsonl, .json or .parquet files. name: the hub's configuration.
        revision: commit or tag of a hub set, for a run that others can repeat.
        splits: the set's names for ``train`` and ``heldout``.
        holdout: rows at the start that are held out where both parts would be the same rows (a single file, or one split);
            None for test-time training: both parts are all rows.
        columns: our name -> theirs, or a list of which the first present is taken; dots reach into nested fields; None leaves one
            out, as the answer of problems without labels.
        where: their column -> the values to keep, as ``{level: [Level 4, Level 5]}``.
        prompt: see ``data.prompts``.
        answer_after: keep only what follows this mark in the answer, as GSM8K's ``####``.
        answer_boxed: keep only what stands in the answer's last ``\\boxed{}``, as in MATH's worked solutions.
        unique: of rows with the same prompt only the first, as for sets that repeat a problem 32 times for avg@32.
        on_bad_row: ``error``, or ``skip``, which reports them by number and goes on.
        max_prompt_chars: a longer prompt is a bad row; a file read the wrong way has one of megabytes.
        streaming: rows are read while training runs; neither memory nor disk holds the set.
    """

    path: str
    columns: Columns
    name: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "heldout": "test"})
    holdout: int | None = None
    where: Mapping[str, Sequence] = field(default_factory=dict)
    prompt: PromptFormat = field(default_factory=PromptFormat)
    answer_after: str | None = None
    answer_boxed: bool = False
    unique: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    max_prompt_chars: int = 100_000
    streaming: bool = False

    def __post_init__(self):
        if self.on_bad_row not in ("error", "skip"):
            raise DataError(f"data.on_bad_row={self.on_bad_row} is not known. Expected error or skip.")
        for name in ("columns", "where", "splits"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise DataError(f"data.{name}={value} is no map. Expected one, as data.{name}={_EXAMPLES[name]}.")
        for name, values in self.where.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise DataError(f"data.where.{name}={values} is no list. Expected the values to keep, as [{values}].")
        if not isinstance(self.path, str) or not self.path.strip():
            raise DataError(f"data.path={self.path!r} is no path. Give a file, a folder, or a hub id.")
        if not isinstance(self.streaming, bool):
            raise DataError(f"data.streaming={self.streaming} is neither true nor false.")
        if "prompt" not in self.columns:
            raise DataError(
                f"data.columns has no 'prompt', only {', '.join(self.columns) or 'nothing'}. Name its column."
            )
        if self.holdout is not None and (not isinstance(self.holdout, int) or self.holdout < 1):
            raise DataError(f"data.holdout={self.holdout} holds nothing out. Expected a whole number above 0, or null.")


def table(source: Source, part: Literal["train", "heldout"], limit: int | None = None) -> Dataset | IterableDataset:
    """One part of a set, its rows in the set's order under our column names, with the prompts as a model sees them.

    Args:
        limit: at most this many rows.

    Raises:
        DataError: nothing there, a missing column (named, with those present), bad rows, or no row left.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"data.limit={limit} does not work. Expected a whole number above 0, or null.")
    if source.streaming and part == "train":
        if next(_good_rows(source, part, limit=1), None) is None:  # what is wrong with the first row is said now
            raise _nothing_left(source, part, limit)
        # a generator that is asked again starts again
        return IterableDataset.from_generator(_good_rows, gen_kwargs={"source": source, "part": part, "limit": limit})
    rows = _good_rows(source, part, limit)
    try:
        chunks = [Dataset.from_list(chunk) for chunk in iter(lambda: list(islice(rows, _CHUNK)), [])]
        if not chunks:
            raise _nothing_left(source, part, limit)
        return concatenate_datasets(chunks)
    except pa.ArrowException as error:
        raise DataError(
            f"data path={source.path} has a column of mixed types: {first_line(error)}. Make it text, or leave it out of data.columns."
        ) from error


def _nothing_left(source: Source, part: str, limit: int | None) -> DataError:
    return DataError(
        f"data path={source.path} has no row left for {part} (holdout={source.holdout}, where={dict(source.where)}, limit={limit}). "
        "Lower data.holdout, or loosen data.where and data.limit."
    )


def plain_text(data: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Chat prompts as the text of their messages, for a tokenizer without a chat template."""
    if isinstance(data, Dataset) and isinstance(data[0]["prompt"], str):
        return data
    if isinstance(data, IterableDataset):
        return data.map(lambda row: {"prompt": plain(row["prompt"])})
    return Dataset.from_list([{**row, "prompt": plain(row["prompt"])} for row in data])


def _good_rows(source: Source, part: str, limit: int | None) -> Iterator[dict]:
    columns: dict[str, str] | None = None
    bad: list[tuple[int, str]] = []
    given, seen, number = 0, set(), 0
    for number, values in _part(source, part):
        if limit is not None and given == limit:
            break
        if isinstance(values, dict):
            columns = columns or resolve(source.path, source.columns, values)
            if not all(reach(values, name) in allowed for name, allowed in source.where.items()):
                continue
            row, reason = _row(values, columns, source)
        else:
            row, reason = {}, values
        if reason is not None:
            bad.append((number, reason))
            if source.streaming:  # the end may never come
                _tell(source, [bad[-1]], number)
            continue
        if source.unique:
            if str(row["prompt"]) in seen:
                continue
            seen.add(str(row["prompt"]))
        given += 1
        yield row
    if bad and not source.streaming:
        _tell(source, bad, number)


def _tell(source: Source, bad: list[tuple[int, str]], total: int) -> None:
    message = report(source.path, bad, total)
    if source.on_bad_row == "error":
        raise DataError(f"{message}. Mend them, or leave them out with data.on_bad_row=skip.")
    log.warning("%s; left out.", message)


def _part(source: Source, part: str) -> Iterator[Row]:
    """The rows of a part: its own split, or its side of ``holdout`` where there is only one set of rows."""
    names = [source.splits[p] for p in ("train", "heldout")]
    files = [local_files(source.path, n) for n in names]
    shared = files[0] == files[1] if files[0] is not None else names[0] == names[1]
    found = rows(source.path, source.name, source.splits[part], source.revision, source.streaming)
    if not shared or source.holdout is None:
        yield from found
        return
    for row in found:
        if (row.number <= source.holdout) == (part == "heldout"):
            yield row
        elif part == "heldout":
            return


def _row(values: dict, columns: Mapping[str, str], source: Source) -> tuple[dict, str | None]:
    """The row as a run sees it, and what is wrong with it."""
    row = pick(values, columns)
    if reason := flaw(row, source.max_prompt_chars):
        return row, reason
    if "answer" in row:
        answer, text = row["answer"], str(row["answer"])
        if isinstance(answer, float) and answer.is_integer():
            text = str(int(answer))  # a column of integers with a hole is read as floats
        if source.answer_after is not None:
            text = text.rsplit(source.answer_after, 1)[-1]
        if source.answer_boxed and (inside := boxed(text)) is not None:
            text = inside
        row["answer"] = text.strip()
        if not row["answer"]:
            return row, "answer is empty"
    row["prompt"] = source.prompt(row["prompt"])
    return row, None


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` (or ``\\boxed x``), braces matched; None without one."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not starts:
        return None
    rest = text[starts[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None
