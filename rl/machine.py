"""What the machine has: memory within the limits of its control groups, a GPU, a disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Bytes of this machine; memory is what the control group of this process allows. No GPU: ``gpu_total`` is None."""

    ram_total: int
    ram_available: int
    disk_free: int
    gpu_total: int | None = None
    gpu_available: int | None = None


def machine(folder: str | Path = ".", root: Path = Path("/")) -> Machine:
    """What this machine has: memory within the limits of cgroup v1 or v2, the current GPU, and the disk of ``folder``.

    Args:
        root: where ``proc`` and ``sys`` are (for tests).
    """
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    info = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1}
    total, available = info["MemTotal"], info["MemAvailable"]
    for limit, used in _cgroup_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    gpu_available, gpu_total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
    return Machine(total, available, shutil.disk_usage(folder).free, gpu_total, gpu_available)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without what the kernel can drop) of the control group of this process and of all above it."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        v2 = not controllers
        top = root / "sys/fs/cgroup" / ("" if v2 else "memory")
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                stat = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if line)
                cached = int(stat.get("inactive_file" if v2 else "total_inactive_file", 0))
                yield int(limit), max(0, int(used) - cached)
            if folder == top:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
