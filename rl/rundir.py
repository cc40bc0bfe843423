"""Run folders: one place per run that says what ran, with what, and how it ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import shlex
import string
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

from rl.errors import CheckpointError, ConfigError, RunExistsError
from rl.redact import public_words

# What a run folder holds, in manifest.json since 2. 1: no such entry; rollouts without alternatives, rank and logp_after; no probes/.
FORMAT = 2

_VERSIONS = (
    "entrl",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "datasets",
    "hydra-core",
    "wandb",
    "math-verify",
)


def run_name(model: str, data: str, plugins: Sequence[str], seed: int) -> str:
    """``<model>_<data>_<plug-ins joined by +>_s<seed>_<four letters>``: readable, and unique for parallel starts."""
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
    return f"{model}_{data}_{'+'.join(plugins) or 'grpo'}_s{seed}_{letters}"


def check_free(directory: Path, name: str, overwrite: bool) -> Path:
    """The folder a run of this name would get.

    Raises:
        RunExistsError: the name is taken and ``overwrite`` is false. ConfigError: it is no name of a folder, or another process trains
        in what would be moved aside.
    """
    if not name or name == ".." or Path(name).name != name or len(name) > 200:
        raise ConfigError(
            f"run.name={name} is no name of a folder. Expected one of up to 200 characters without / in it; run.dir says where it goes."
        )
    folder = Path(directory) / name
    if folder.exists() and not overwrite:
        raise RunExistsError(
            f"{folder} exists already. Go on with it: resume=auto, give another run.name, or run.overwrite=true to move it "
            f"aside to {name}.old-<n>."
        )
    if folder.exists():
        held(folder).close()  # else two runs would write into one folder
    return folder


def create(directory: Path, name: str, overwrite: bool) -> Path:
    """Make the folder of a new run, with ``rollouts/`` and ``checkpoints/`` left to who fills them.

    Raises:
        RunExistsError: the name is taken and ``overwrite`` is false.
    """
    folder = check_free(directory, name, overwrite)
    try:
        if folder.exists():
            number = 1
            while (aside := folder.with_name(f"{name}.old-{number}")).exists():
                number += 1
            folder.rename(aside)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be written: {error.strerror}. Give another folder.") from error
    return folder


def named(argv: Sequence[str]) -> Path:
    """The run folder on a command line that has nothing else.

    Raises:
        CheckpointError: there is none, or it holds no prepared run.
    """
    if len(argv) != 1:
        raise CheckpointError(f"Expected one run folder, as runs/NAME, and got {shlex.join(argv) or 'none'}.")
    return prepared(Path(argv[0]))


def prepared(folder: Path) -> Path:
    """``folder``, when it was written to its end.

    Raises:
        CheckpointError: it was not, or is something else.
    """
    if (folder / "config.yaml").is_file() and (folder / "manifest.json").is_file():
        return folder
    if (folder / "sweep.json").is_file():
        raise CheckpointError(f"{folder} is a sweep. To run again what did not finish: entrl sweep retry {folder}.")
    if (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} has no manifest.json: it was not written to its end. Delete it and start anew."
        )
    raise CheckpointError(f"{folder} is no run folder: it has no config.yaml. Give one that entrl wrote, as runs/NAME.")


def not_writable(folder: Path, error: OSError) -> ConfigError:
    """The error for a folder that cannot be written."""
    return ConfigError(f"{folder} cannot be written: {error.strerror}. Make it writable, or give another run.dir.")


def hold(folder: Path) -> IO[str] | None:
    """Hold a run folder until the file is closed or this process ends, however it ends; None while another process does.

    Child processes do not inherit the hold. A file system without locks lets everybody have it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        lock = open(Path(folder) / ".lock", "w", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            return None
    return lock


def held(folder: Path) -> IO[str]:
    """:func:`hold`, as a context.

    Raises:
        ConfigError: another process trains in the folder, or it cannot be written.
    """
    lock = hold(folder)
    if lock is None:
        raise ConfigError(f"{folder} is being trained by another process. Wait for it, or stop it first.")
    return lock


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that no reader ever sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several ranks may have something to say at once
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe(folder: Path, config_yaml: str, overrides: Sequence[str], argv: Sequence[str], seed: int) -> None:
    """Write config.yaml, overrides.txt, command.sh and manifest.json, secrets of the command line masked."""
    write_text(folder / "config.yaml", config_yaml)
    write_text(folder / "overrides.txt", "".join(f"{o}\n" for o in public_words(overrides)))
    write_text(folder / "command.sh", shlex.join(["entrl", *public_words(argv)]) + "\n")
    write_json(folder / "manifest.json", manifest(seed))


def manifest(seed: int) -> dict[str, Any]:
    """What one needs to run it again: versions, commit, hardware, seed. No environment variables, no user name."""
    return {
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _VERSIONS}},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "system": platform.system(),
            "gpus": _gpus(),
        },
        "seed": seed,
    }


def update_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Add to manifest.json what is known only later, as the W&B id."""
    write_json(folder / "manifest.json", {**read_manifest(folder), **values})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json holds."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


_MARKERS = {"DONE": "done", "FAILED": "failed", "STOPPED": "stopped"}


def finish(folder: Path, marker: Literal["DONE", "FAILED", "STOPPED"], reason: str = "") -> None:
    """Leave DONE, FAILED or STOPPED, the reason in it, and no other of them."""
    write_text(folder / marker, f"{reason}\n")
    for other in _MARKERS.keys() - {marker}:
        (folder / other).unlink(missing_ok=True)


def reopen(folder: Path) -> None:
    """Take the markers of an earlier end away: the run goes on."""
    for marker in _MARKERS:
        (folder / marker).unlink(missing_ok=True)


def state(folder: Path) -> Literal["done", "failed", "stopped", "open"]:
    """How a run ended; open: it goes on, was never started, or was killed hard."""
    return next((word for marker, word in _MARKERS.items() if (Path(folder) / marker).is_file()), "open")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that entrl runs from, and whether it was changed."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__):
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
