"""``entrl sync``: W&B gets what it lacks of runs that were recorded offline, cut off or resumed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rl.errors import ConfigError
from rl.redact import without_secrets
from rl.rundir import hold
from rl.tracking import last_step
from rl.wandb_run import Record, WandbRun, about, has_key

INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 600.0  # seconds; nothing waits for this command, and tables may be many


def sync(paths: Sequence[str]) -> int:
    """Deliver the runs in these folders, one line each; returns 0 if W&B has all of them afterwards, else 1.

    What W&B has is not sent again, so that it can be repeated at any time. A run that is going on is left to itself.

    Args:
        paths: run folders, or folders of run folders.

    Raises:
        ConfigError: a path that holds no run with W&B on, or no key.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in run_folders(Path(path))))
    failures = 0
    for number, folder in enumerate(folders, start=1):
        started = time.perf_counter()
        arrived, said = _deliver(folder)
        failures += not arrived
        print(f"[{number}/{len(folders)}] {folder}  {said}", flush=True)
        if not arrived and time.perf_counter() - started >= INIT_TIMEOUT and number < len(folders):
            print(f"W&B does not answer; {len(folders) - number} more were not tried.")
            break
    if failures:
        print("Not everything was delivered. Nothing is lost: run the same command again.")
    return int(failures > 0)


def run_folders(path: Path) -> list[Path]:
    """The folders with a W&B run at ``path``, below it, or one level further down.

    Raises:
        ConfigError: there are none.
    """
    found = sorted({record.parent for depth in ("", "*/", "*/*/") for record in path.glob(f"{depth}tracking.json")})
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder. Expected a run folder or a folder of them, as runs/NAME or runs.")
    if not found:
        raise ConfigError(
            f"{path} holds no run that W&B was on for (logger.mode=disabled leaves metrics.jsonl only). Expected runs/NAME or a folder of such."
        )
    return found


def _deliver(folder: Path) -> tuple[bool, str]:
    """Whether nothing is left to do for a run, and what to say of it."""
    record, last = Record.load(folder), last_step(folder)
    if record.delivered == last:
        return True, f"nothing missing, W&B has all {last} steps"
    if not has_key():
        raise ConfigError("No W&B key was found in WANDB_API_KEY or ~/.netrc. Run wandb login, then entrl sync again.")
    try:
        held = hold(folder)
        if held is None:
            return True, "is going on; sync it when it has ended"
        with held:
            return _send(folder, record, last)
    except Exception as error:  # of any kind: wandb is a network client with a process of its own
        return False, f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _send(folder: Path, record: Record, last: int) -> tuple[bool, str]:
    timeouts = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
    run = WandbRun(folder, record, "online", _config(folder), **timeouts)
    try:
        sent = run.catch_up()
    finally:
        arrived = run.finish(record.summary or {}, failed=record.failed is not False)  # no end on record: it was killed
    if not arrived:
        return False, f"failed: W&B did not take all of {sent} steps"
    record.save(folder, delivered=last)
    return True, f"{sent} of {last} steps sent: {run.url}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return {**without_secrets(config), "entrl": about(folder, config)}
