"""Samples on disk: in parts while they are drawn, so that a killed evaluation goes on where it was, then as one table."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

_KEY = b"entrl"  # of the parquet's own metadata
_BROKEN = "the file is broken"


class Store:
    """The samples of one evaluation: ``X.parquet`` when finished, ``X.parts/part_0000.parquet`` and so on before.

    Every file carries ``facts`` in its metadata: samples that were drawn under other facts are never taken for these.

    Args:
        path: ``X.parquet``. facts: everything that determines the samples; must be JSON.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path, self.parts = path, path.with_suffix(".parts")
        self.facts = json.loads(json.dumps(facts))

    def prepare(self) -> str | None:
        """Make way for these samples: finished ones of other facts are moved aside, parts of other facts deleted.

        Of parts that are broken each is drawn again, the others stay.

        Returns:
            What a person should know about samples that were found, None where there were none.
        """
        if self.path.is_file():
            reason = self._unfit(self.path)
            if not reason:
                return f"reused from {self.path}; delete it to draw again"
            number = 1
            while (aside := self.path.with_name(f"{self.path.stem}.old-{number}.parquet")).exists():
                number += 1
            self.path.rename(aside)
            return f"drawn anew ({reason}); the old ones are {aside}"
        found = sorted(self.parts.glob("part_*.parquet")) if self.parts.is_dir() else []
        if not found:
            return None
        reasons = [self._unfit(path) for path in found]
        other = next((reason for reason in reasons if reason and reason != _BROKEN), None)
        if other:
            shutil.rmtree(self.parts)
            return f"drawn anew ({other}); {len(found)} old parts in {self.parts} were deleted"
        broken = reasons.count(_BROKEN)
        again = f", {broken} more are broken and drawn again" if broken else ""
        return f"resumed: {len(found) - broken} parts were in {self.parts}{again}"

    def finished(self) -> pd.DataFrame | None:
        """The whole table, None while there is none of these facts."""
        return self._read(self.path)

    def part(self, number: int) -> pd.DataFrame | None:
        """What :meth:`keep` was given under this number, None if nothing."""
        return self._read(self._part(number))

    def keep(self, number: int, samples: pd.DataFrame) -> None:
        """Write one part."""
        self._write(self._part(number), samples)

    def finish(self, samples: pd.DataFrame) -> None:
        """Write the whole table, then delete the parts."""
        self._write(self.path, samples)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.parts / f"part_{number:04}.parquet"

    def _unfit(self, path: Path) -> str | None:
        """Why a file does not hold these samples; None if it does."""
        try:
            facts = json.loads((pq.read_schema(path).metadata or {})[_KEY])
        except KeyError:
            return "the version of entrl changed"
        except (pa.ArrowException, OSError):
            return _BROKEN
        differing = sorted(k for k in {*facts, *self.facts} if facts.get(k) != self.facts.get(k))
        return f"{_and(differing)} changed" if differing else None

    def _read(self, path: Path) -> pd.DataFrame | None:
        return pd.read_parquet(path) if path.is_file() and self._unfit(path) is None else None

    def _write(self, path: Path, samples: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(samples, preserve_index=False)
        table = table.replace_schema_metadata({**table.schema.metadata, _KEY: json.dumps(self.facts)})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(table, partial)
        partial.replace(path)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def fingerprint(values: Any) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def model_fact(path: str, commit: str | None) -> Any:
    """What tells one model from another: the commit on the hub, or sizes and times of the files in a folder.

    A folder with adapters stands for its base model as well.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"hub": path, "commit": commit}
    names = sorted(p for pattern in ("*.safetensors", "*.bin", "*config.json") for p in folder.glob(pattern))
    files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in names}
    base = base_of_adapters(path)
    return files if base is None else {**files, "base": model_fact(base, commit)}


def base_of_adapters(path: str) -> str | None:
    """The base model of a folder with adapters, None where a model is whole."""
    config = Path(path) / "adapter_config.json"
    return json.loads(config.read_text())["base_model_name_or_path"] if config.is_file() else None
