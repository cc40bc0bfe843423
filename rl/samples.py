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

        Returns:
            What a person should know about samples that were found, None where there were none.
        """
        if self.path.is_file():
            differing = self._differing(self.path)
            if not differing:
                return f"reused from {self.path}; delete it to draw again"
            number = 1
            while (aside := self.path.with_name(f"{self.path.stem}.old-{number}.parquet")).exists():
                number += 1
            self.path.rename(aside)
            return f"drawn anew ({_and(differing)} changed); the old ones are {aside}"
        found = sorted(self.parts.glob("part_*.parquet")) if self.parts.is_dir() else []
        if not found:
            return None
        differing = next(filter(None, map(self._differing, found)), [])
        if differing:
            shutil.rmtree(self.parts)
            return f"drawn anew ({_and(differing)} changed); {len(found)} old parts in {self.parts} were deleted"
        return f"resumed: {len(found)} parts were in {self.parts}"

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

    def _differing(self, path: Path) -> list[str]:
        """The names of facts that are others in a file."""
        try:
            facts = json.loads((pq.read_schema(path).metadata or {})[_KEY])
        except KeyError:
            return ["the version of entrl"]
        except (pa.ArrowException, OSError):
            return ["nothing, but a file is broken,"]
        return sorted(k for k in {*facts, *self.facts} if facts.get(k) != self.facts.get(k))

    def _read(self, path: Path) -> pd.DataFrame | None:
        return pd.read_parquet(path) if path.is_file() and not self._differing(path) else None

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
    adapters = folder / "adapter_config.json"
    if adapters.is_file():
        files["base"] = model_fact(json.loads(adapters.read_text())["base_model_name_or_path"], commit)
    return files
