"""Rows as they stand in a local file or on the hub, one by one, each with its number; what cannot be read is said, not lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from data.errors import DataError

FORMATS = (".jsonl", ".json", ".parquet")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


class Row(NamedTuple):
    """A row and its number, counted from 1; ``values`` is a sentence instead of a dict where the row cannot be read."""

    number: int
    values: dict | str


def local_files(path: str, split: str) -> list[Path] | None:
    """The files of a local path, None for a hub id.

    Of a folder whose files are named after splits (``train.parquet``, ``test-00000-of-00002.parquet``), those of this split.

    Raises:
        DataError: nothing there, an unknown format, a mixture of formats, or no file of this split among those of others.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if local.suffix in FORMATS or path.startswith((".", "/", "~")):
            raise DataError(
                f"data path={path} does not exist. Give a .jsonl or .parquet file, a folder of them, or a hub id."
            )
        return None
    files = sorted(p for p in local.rglob("*") if p.suffix in FORMATS) if local.is_dir() else [local]
    if len({f.suffix for f in files} & set(FORMATS)) != 1 or any(f.suffix not in FORMATS for f in files):
        found = sorted({f.suffix or "no suffix" for f in files}) or ["nothing"]
        raise DataError(
            f"data path={path} holds {', '.join(found)}. Expected files of one kind: .jsonl, .json or .parquet."
        )
    parts = {f: f.stem.split("-")[0] for f in files}
    if not local.is_dir() or not (_SPLITS | {split}) & set(parts.values()):
        return files
    if split not in parts.values():
        raise DataError(
            f"data path={path} has no file for the split {split!r}, only {', '.join(sorted(set(parts.values())))}. "
            f"Name one of them in data.splits, or give a single file."
        )
    return [f for f, part in parts.items() if part == split]


def rows(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Iterator[Row]:
    """Every row of one split, in the set's order. ``streaming`` reads a hub set without downloading all of it first.

    Raises:
        DataError: nothing there or nothing readable; a single bad row is no error.
    """
    files = local_files(path, split)
    found = _hub(path, name, split, revision, streaming) if files is None else _local(path, files)
    empty = True
    for number, values in enumerate(found, 1):
        if values is not None:
            empty = False
            yield Row(number, values)
    if empty:
        raise DataError(f"data path={path} is empty. Expected at least one row.")


def _local(path: str, files: list[Path]) -> Iterator[dict | str | None]:
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _jsonl(file)
            elif file.suffix == ".json":
                yield from _json(file)
            else:
                yield from _parquet(file)
        except (OSError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"data path={path} cannot be read: {first_line(error)}. Expected a valid {file.suffix} file."
            ) from error


def _jsonl(file: Path) -> Iterator[dict | str | None]:
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                yield None  # counted, so that row numbers are line numbers
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield f"is not valid UTF-8 (byte {line[error.start]:#04x} at {error.start})"
            except (json.JSONDecodeError, RecursionError) as error:
                yield f"is no JSON: {first_line(error)}"
            else:
                yield values if isinstance(values, dict) else f"is a {type(values).__name__}, expected an object"


def _json(file: Path) -> Iterator[dict | str]:
    table = json.loads(file.read_bytes().decode("utf-8-sig") or "[]")
    if not isinstance(table, list):
        raise DataError(
            f"{file} holds a {type(table).__name__}. Expected a list of objects, or one object a line as .jsonl."
        )
    for values in table:
        yield values if isinstance(values, dict) else f"is a {type(values).__name__}, expected an object"


def _parquet(file: Path) -> Iterator[dict | str]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # parquet does not check its strings; find the rows that are broken
            for i in range(len(batch)):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield f"is not valid UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"


def _hub(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Iterator[dict]:
    try:
        yield from load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"data path={path} (split {split}) could not be loaded from the hub: {first_line(error)}. "
            "Check the id and the network, or download it once and give its local path."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
