"""Problem sets from the hub, or from local JSONL, JSON or parquet files, under entrl's column names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from data.errors import DataError

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def table(
    path: str,
    *,
    columns: Mapping[str, str],
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    template: str | None = None,
    answer_after: str | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> Dataset:
    """A data set whose rows have the columns of ``columns``, in the set's order.

    Args:
        path: hub id, or a local file or folder of .jsonl, .json or .parquet files. name: the hub's configuration.
        columns: our name -> theirs, dots reach into nested fields: ``{"answer": "reward_model.ground_truth"}``.
        split, revision: of a hub set.
        template: text with ``{prompt}`` around a plain-text prompt; chats stay as they are.
        answer_after: keep only what follows this mark in the answer, as GSM8K's "####".
        skip, limit: which rows, counted from the start.

    Raises:
        DataError: nothing there, a missing column (named, with those present), or no row left.
    """
    data = _load(path, name, split, revision)
    if not len(data):
        raise DataError(f"data path={path} is empty. Expected at least one row.")
    end = len(data) if limit is None else min(skip + limit, len(data))
    if skip >= end:
        raise DataError(f"data path={path} has no row left of {len(data)} after skip={skip}, limit={limit}.")
    data = data.select(range(skip, end))
    for ours, theirs in columns.items():
        _check_column(path, data, ours, theirs)

    def rename(row: dict) -> dict:
        out = {ours: _reach(row, theirs) for ours, theirs in columns.items()}
        if template is not None and isinstance(out.get("prompt"), str):
            out["prompt"] = template.format(prompt=out["prompt"])
        if answer_after is not None:
            out["answer"] = str(out["answer"]).rsplit(answer_after, 1)[-1].strip()
        return out

    return Dataset.from_list([rename(row) for row in data])


def plain_text(data: Dataset) -> Dataset:
    """Chat prompts as the text of their messages, for a tokenizer without a chat template."""
    if isinstance(data[0]["prompt"], str):
        return data
    rows = [{**row, "prompt": "\n".join(message["content"] for message in row["prompt"]) + "\n"} for row in data]
    return Dataset.from_list(rows)


def _load(path: str, name: str | None, split: str, revision: str | None) -> Dataset:
    local = Path(path).expanduser()
    if local.exists():
        files = sorted(p for p in local.rglob("*") if p.suffix in _FORMATS) if local.is_dir() else [local]
        if files and all(f.stat().st_size == 0 for f in files):
            raise DataError(f"data path={path} is empty. Expected at least one row.")
        kinds = {_FORMATS.get(f.suffix) for f in files}
        if len(kinds) != 1 or None in kinds:
            found = sorted({f.suffix or "no suffix" for f in files}) or ["nothing"]
            raise DataError(
                f"data path={path} holds {', '.join(found)}. Expected files of one kind: .jsonl, .json or .parquet."
            )
        try:
            return load_dataset(kinds.pop(), data_files=[str(f) for f in files], split="train")
        except Exception as error:  # datasets wraps pyarrow's and json's errors in its own
            raise DataError(
                f"data path={path} cannot be read: {_root(error)}. Expected a valid {files[0].suffix} file."
            ) from error
    if local.suffix in _FORMATS or path.startswith((".", "/", "~")):
        raise DataError(
            f"data path={path} does not exist. Give a .jsonl or .parquet file, a folder of them, or a hub id."
        )
    try:
        return load_dataset(path, name, split=split, revision=revision)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"data path={path} (split {split}) could not be loaded from the hub: {_root(error)}. "
            "Check the id and the network, or download it once and give its local path."
        ) from error


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_column(path: str, data: Dataset, ours: str, theirs: str) -> None:
    row, present = data[0], data.column_names
    for part in theirs.split("."):
        if not isinstance(row, dict) or part not in row:
            raise DataError(
                f"data path={path} has no column {theirs!r} for {ours!r}. Present: {', '.join(present)}. "
                f"Set data.columns.{ours} to one of them."
            )
        row = row[part]
        present = [f"{theirs.split('.')[0]}.{k}" for k in row] if isinstance(row, dict) else present


def _reach(row: dict, dotted: str):
    for part in dotted.split("."):
        row = row[part]
    return row
