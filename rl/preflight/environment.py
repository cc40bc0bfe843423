"""Packages, hardware, disk and credentials."""

from __future__ import annotations

import importlib.metadata as metadata
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import get_token
from packaging.requirements import Requirement

from rl.machine import machine
from rl.preflight.report import Section
from rl.tracking import resolve_mode
from rl.wandb_run import has_key

_SHOWN = ("torch", "trl", "transformers", "datasets", "peft", "accelerate", "deepspeed", "vllm")
_GIB = 2**30


def check_packages(section: Section) -> None:
    """Installed versions against the ranges of entrl's own requirements."""
    versions = {}
    for name in _SHOWN:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    section.fact(f"python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    for text in metadata.requires("entrl") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            section.error(f'{needed.name} is not installed; entrl needs {needed}. Run pip install "{needed}".')
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            section.error(f'{needed.name} {installed} is installed; entrl needs {needed}. Run pip install "{needed}".')


def check_machine(section: Section, run_dir: str, weights: int, logger_mode: str) -> None:
    """GPU, disk under ``run_dir`` against ``weights`` bytes of a checkpoint, credentials (whether they are there, never what)."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        section.fact(f"{len(gpus)} x {gpus[0]}, CUDA {torch.version.cuda}")
    else:
        section.fact("no GPU: everything runs on the CPU in fp32")
    folder = Path(run_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        section.error(f"run.dir={run_dir} cannot be written to. Choose another: run.dir=FOLDER.")
    free = machine(folder).disk_free
    section.fact(f"{free / _GIB:.0f} GiB of disk free under run.dir")
    if weights > free:
        section.error(
            f"run.dir={run_dir} has {free / _GIB:.1f} GiB free; one checkpoint takes {weights / _GIB:.1f} GiB. Choose another run.dir."
        )
    mode = resolve_mode(logger_mode)
    key = "a key" if has_key() else "no key"
    section.fact(f"W&B: {mode} ({key} found); hub: {'a token' if get_token() else 'no token'} found")
    if mode == "online" and not has_key():
        section.error("logger.mode=online, but no W&B key was found. Run wandb login, or use logger.mode=offline.")
