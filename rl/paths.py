"""Where entrl's own files are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from rl.checkpoint import found
from rl.errors import CheckpointError

_HERE = Path(__file__).parent


def configs_dir() -> Path:
    """The configuration groups: beside the package in a checkout, inside it in a wheel."""
    packaged = _HERE / "_configs"
    return packaged if packaged.is_dir() else _HERE.parent / "configs"


def slurm_dir() -> Path:
    """The parts of sbatch scripts: beside the package in a checkout, inside it in a wheel."""
    packaged = _HERE / "_slurm"
    return packaged if packaged.is_dir() else _HERE.parent / "slurm"


def plain_name(name: str) -> str:
    """A name for a file."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name).strip("_.") or "model"


def find_model(target: str) -> str:
    """A name ``from_pretrained`` takes, for ``builtin:NAME``, a run folder, a saved model or a hub id.

    A run folder's is its final model, or its newest checkpoint where it has not finished.

    Raises:
        CheckpointError: a folder, or something that looks like a path, without a model in it.
    """
    if target.startswith("builtin:"):
        folder = _HERE / "assets" / target.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{p.name}" for p in sorted((_HERE / "assets").iterdir()) if p.is_dir())
            raise CheckpointError(f"{target} does not ship with entrl. Known: {known}.")
        return str(folder)
    folder = Path(target).expanduser()
    if folder.is_dir():
        newest = [path for _, path in reversed(found(folder / "checkpoints"))]
        for candidate in (folder / "checkpoints" / "final", *newest, folder):
            if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
                return str(candidate)
        raise CheckpointError(
            f"{target} holds no model: neither config.json nor checkpoints/final/config.json nor a checkpoint is there. "
            "Give a run folder that wrote one, a folder written by save_pretrained, or a hub id."
        )
    if folder.exists() or target.count("/") != 1 or target.startswith((".", "~", "/")):
        raise CheckpointError(
            f"{target} is no folder with a model. Give a run folder, a saved model, or a hub id as org/name."
        )
    return target
