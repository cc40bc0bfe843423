"""Checkpoint folders: written beside their place and renamed when whole, verified before use, pruned.

checkpoints/checkpoint-<step>/entrl.json: step, processes, engine, and size and checksum of every file.
checkpoints/.partial-checkpoint-<step>/: under way, or left by a save that was killed.
checkpoints/final/: the model at the end; entrl.json: of which step.
checkpoints/aside-checkpoint-<step>/: broken, or overtaken when the run went on from an earlier one; for people to delete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from rl.errors import CheckpointError, ConfigError
from rl.rundir import write_json, write_text

MANIFEST = "entrl.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OF_STEP = re.compile(r"step_(\d+)\..*")
_BLOCK = 1 << 23
_THREADS = 8


class Checkpoints:
    """The checkpoints of one run. Only the main process may call what writes; several nodes need a shared file system.

    Args:
        folder: usually ``RUN/checkpoints``. every: steps between checkpoints, None for only where one is asked for.
        keep_last: so many of the newest stay, None for all. keep_every: those of steps that are a multiple stay for ever.

    Raises:
        ConfigError: a number that does not work.
    """

    def __init__(self, folder: Path, *, every: int | None, keep_last: int | None, keep_every: int | None = None):
        for key, value in {"every": every, "keep_last": keep_last, "keep_every": keep_every}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"checkpoint.{key}={value} does not work. Expected a whole number from 1 on, or null."
                )
        if every and keep_every and keep_every % every:
            raise ConfigError(
                f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}, so few steps or none would "
                f"be kept. Try checkpoint.keep_every={max(1, round(keep_every / every)) * every}."
            )
        self.folder, self.every, self.keep_last, self.keep_every = Path(folder), every, keep_last, keep_every

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return self.every is not None and step % self.every == 0

    def start(self, step: int) -> None:
        """Before training goes on from ``step`` (0: anew): half-written checkpoints go, later ones are set aside."""
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        for later, path in found(self.folder):
            if later > step:
                self._set_aside(path)

    def partial(self, step: int) -> Path:
        """Where the checkpoint of this step is written to; transformers makes the folder ``checkpoint-<step>`` in it."""
        return self.folder / f".partial-checkpoint-{step}"

    def open(self, step: int) -> None:
        """Make room for a checkpoint."""
        shutil.rmtree(self.partial(step), ignore_errors=True)
        self.partial(step).mkdir(parents=True)

    def discard(self, step: int) -> None:
        """Drop what was written of a checkpoint that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def commit(self, step: int, world: int, facts: Mapping[str, Any]) -> Path:
        """Once all ranks have written: describe the files, give the folder its name, prune."""
        name = f"checkpoint-{step}"
        written, path = self.partial(step) / name, self.folder / name
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        manifest = {
            "step": step,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": world,
            "facts": dict(facts),
            "files": _checksums(written, sorted(_files(written)), flush=True),
        }
        write_json(written / MANIFEST, manifest)
        _flush(written / MANIFEST)
        if path.exists():
            self._set_aside(path)
        written.rename(path)
        _flush(self.folder)  # before an older one goes
        self.discard(step)
        self._prune()
        return path

    def final_step(self) -> int | None:
        """The step that ``final`` is of, None without one that is whole."""
        try:
            return json.loads((self.folder / "final" / MANIFEST).read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def commit_final(self, written: Path, step: int) -> None:
        """Once all ranks have written the model into ``written``: give the folder its name, in place of an earlier one."""
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        write_json(written / MANIFEST, {"step": step})
        final, old = self.folder / "final", self.folder / ".partial-old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        written.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def newest_good(self, world: int) -> Path | None:
        """The newest checkpoint that is whole, None without any; warns of each broken one.

        Raises:
            ConfigError: it was written by another number of processes than ``world``.
        """
        path = newest_good(self.folder)
        if path is not None:
            check_processes(path, world)
        return path

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for step, path in found(self.folder)[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                going = self.partial(step)  # a name nobody reads, before its files go one by one
                path.rename(going)
                shutil.rmtree(going, ignore_errors=True)

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"aside-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def found(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, oldest first, whole or not."""
    if not Path(folder).is_dir():
        return []
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in Path(folder).iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` whose files are as they were written; warns of each broken one."""
    for _, path in reversed(found(folder)):
        flaw = flaw_of(path)
        if flaw is None:
            return path
        warnings.warn(f"{path} is broken: {flaw}. The checkpoint before it is tried.", stacklevel=2)
    return None


def manifest_of(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint.

    Raises:
        CheckpointError: no checkpoint of entrl.
    """
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        if {"step", "processes", "facts", "files"} <= set(manifest):
            return manifest
    except (OSError, ValueError, TypeError):
        pass
    raise CheckpointError(
        f"{path} holds no {MANIFEST}, so it is no checkpoint that a run can go on from. Give a folder "
        "RUN/checkpoints/checkpoint-<step>, or start a new run from a model's weights with model.path=."
    )


def flaw_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is. Reads every byte, several files at a time."""
    try:
        manifest = manifest_of(path)
    except CheckpointError:
        return f"{MANIFEST} is missing or damaged"
    if path.name != f"checkpoint-{manifest['step']}":
        return f"{MANIFEST} is that of step {manifest['step']}"
    for name, known in manifest["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != known["bytes"]:
            return f"{name} has {size:,} bytes instead of {known['bytes']:,}"
    try:
        now = _checksums(path, list(manifest["files"]))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    changed = [name for name, known in manifest["files"].items() if now[name] != known]
    return f"{changed[0]} has other bytes than were written" if changed else None


def check_processes(path: Path, world: int) -> None:
    """Raise ConfigError for a checkpoint that another number of processes has written."""
    processes = manifest_of(path)["processes"]
    if processes != world:
        raise ConfigError(
            f"{path} was written by {processes} process{'es' * (processes != 1)}, now there {'is' if world == 1 else 'are'} {world}. "
            "Going on exactly needs the same number: start as many again, or a new run from the weights with "
            f"model.path={path}."
        )


def rewind(run_folder: Path, step: int) -> None:
    """Bring a run's records back to ``step``: later lines of metrics and alarms, a torn one, later recorded rollouts and probes go."""
    for name in ("metrics.jsonl", "alarms.jsonl"):
        path = Path(run_folder) / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
            if kept != text:
                write_text(path, kept)
    for folder in ("rollouts", "probes"):
        for path in (Path(run_folder) / folder).glob("step_*"):
            if (match := _OF_STEP.fullmatch(path.name)) and int(match[1]) > step:
                path.unlink()


def _step_of(line: str) -> float:
    """The step of a line, infinite where a kill has torn it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()


def _checksums(folder: Path, names: list[str], flush: bool = False) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file; ``flush`` first waits until the disk has it."""

    def of(name: str) -> dict[str, Any]:
        checksum = xxhash.xxh3_128()
        with open(folder / name, "rb") as file:
            if flush:
                os.fsync(file.fileno())
            while block := file.read(_BLOCK):
                checksum.update(block)  # lets other threads run meanwhile
            return {"bytes": file.tell(), "xxh3_128": checksum.hexdigest()}

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
