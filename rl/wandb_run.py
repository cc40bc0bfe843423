"""One W&B run, fed with the lines of ``metrics.jsonl``: live, after a resume, and by ``entrl sync``.

``wandb sync`` is not used. It replays a recorded file behind whatever the server holds, so that a run which was delivered in part, or
resumed, gets steps twice; it marks a file as delivered when the upload failed; and it ends with 0 when it did nothing (wandb 0.31).
Here the server is asked which steps it has, and gets the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import secrets
import shutil
import string
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self
from urllib.parse import urlparse

from rl.redact import public_words
from rl.rundir import read_json, write_json
from rl.shadows import acting_plugins


@dataclass(frozen=True)
class Record:
    """What W&B knows a run by, and how far it got: ``tracking.json`` in the run folder.

    delivered: the last step that W&B has, None unless everything arrived and the run was closed there. failed: None until it ended.
    evaluations: what was measured on held-out problems, by the step (as text).
    """

    id: str
    project: str
    entity: str | None
    name: str
    group: str | None = None
    tags: Sequence[str] = ()
    summary: Mapping[str, float] | None = None
    failed: bool | None = None
    delivered: int | None = None
    evaluations: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The record of a run folder; None where W&B was off."""
        path = Path(folder) / "tracking.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, folder: Path, **changes: Any) -> Self:
        """Write it, with changes; returns what was written."""
        changed = replace(self, **changes)
        write_json(Path(folder) / "tracking.json", asdict(changed))
        return changed


def new_run_id() -> str:
    """An id for a W&B run, to be written down before W&B is asked for anything."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file that may not be there; a line torn by a kill is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def plugins(config: Mapping[str, Any]) -> str:
    """The acting plug-ins of a run in one word, to group by: ``fork_mask+steer``, or ``grpo`` without any."""
    return "+".join(acting_plugins(config)) or "grpo"


def set_names(config: Mapping[str, Any]) -> list[str]:
    """The sets of held-out problems that a run is evaluated on, its main one first."""
    data = config.get("data") or {}
    sets = (config.get("eval") or {}).get("sets") or data.get("sets")
    return [node.get("name", key) for key, node in sets.items()] if sets else [data.get("name", "heldout")]


def about(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What W&B's configuration has beside the run's own, under ``entrl``: version, commit, plug-ins in one word, sets in order."""
    manifest = read_json(Path(folder) / "manifest.json")
    return {
        "version": manifest.get("versions", {}).get("entrl"),
        **(manifest.get("git") or {}),
        "plugins": plugins(config),
        "sets": set_names(config),
    }


def import_wandb() -> ModuleType:
    """wandb without its reports on itself, for which the end of the process waits up to 20 s where no server answers."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def has_key() -> bool:
    """Whether a W&B key is in the environment or in the netrc file; it is never read out."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def endings(folder: Path) -> dict[str, float]:
    """What runs are sorted by: mean reward and entropy over the last tenth of the steps, and the lowest entropy of any."""
    lines = list(read_lines(Path(folder) / "metrics.jsonl"))
    found = {}
    last = lines[-math.ceil(len(lines) / 10) :]
    for name in ("reward/mean", "entropy/mean"):
        values = [line[name] for line in last if line.get(name) is not None]
        if values:
            found[f"last_tenth/{name}"] = sum(values) / len(values)
    entropies = [line["entropy/mean"] for line in lines if line.get("entropy/mean") is not None]
    if entropies:
        found["lowest/entropy/mean"] = min(entropies)
    return found


@contextlib.contextmanager
def _public_arguments() -> Iterator[None]:
    """Hide secrets on the command line, which wandb uploads."""
    words = sys.argv
    sys.argv = public_words(words)
    try:
        yield
    finally:
        sys.argv = words


class WandbRun:
    """An open W&B run.

    Args:
        folder: the run folder; wandb writes below ``folder/wandb``.
        mode: "online" continues the run of this id if the server has one.
        init_timeout, finish_timeout: seconds.

    Raises:
        Exception: whatever wandb raises when it cannot start: no or a wrong key, no server, no answer in ``init_timeout``.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        mode: Literal["online", "offline"],
        config: Mapping[str, Any],
        *,
        init_timeout: float,
        finish_timeout: float,
    ):
        wandb = import_wandb()
        self.folder, self.online = Path(folder), mode == "online"
        self._finish_timeout = finish_timeout
        self._table: threading.Thread | None = None
        self._time = time.time()
        self._evaluations = {int(step): metrics for step, metrics in (record.evaluations or {}).items()}
        settings = wandb.Settings(
            init_timeout=init_timeout,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
            silent=True,
            reinit="create_new",  # otherwise a second run of this process would be the first one again
            console="off",
            x_disable_stats=True,
        )
        there = set(self._segments())
        try:
            with _public_arguments():
                self._run = wandb.init(
                    project=record.project,
                    entity=record.entity,
                    name=record.name,
                    group=record.group,
                    tags=list(record.tags),
                    config=dict(config),
                    dir=str(folder),
                    id=record.id,
                    mode=mode,
                    resume="allow" if self.online else None,
                    settings=settings,
                )
        except Exception:
            with contextlib.suppress(Exception):
                wandb.teardown()  # its process would hold the id of the failed run as taken
            self._remove_empty(there)
            raise
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")
        self.first = self._run.starting_step

    def send(self, line: Mapping[str, Any]) -> None:
        """Send one line of ``metrics.jsonl``, unless the server has its step."""
        import wandb

        if line["step"] < self.first:
            return
        row = {"train/global_step": line["step"]}
        for name, value in line.items():
            if isinstance(value, Mapping):
                row[name] = wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
            elif name == "time/at":
                self._time = row["_timestamp"] = value  # W&B's axis of wall time, also for steps that are sent later
            elif name != "step":
                row[name] = math.nan if value is None else value
        self._run.log(row, step=line["step"])

    def send_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send what was measured at ``step``, 0 before the training, into its row; wandb drops what comes when that is closed."""
        self._run.log({"train/global_step": step, "_timestamp": self._time, **metrics}, step=step)

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the user, by mail or Slack as the account says."""
        self._run.alert(title=title, text=text, level="WARN")

    def send_table(self, line: Mapping[str, Any]) -> None:
        """Send one line of ``tables.jsonl``, into the row that is open.

        Online, wandb asks the server about every table first, and waits 19 s for one that does not answer. The training does not:
        a thread does, and a table that comes meanwhile is left out.
        """
        if line["step"] < self.first:  # no row is open for it: it would make one, and pass for a step that is there
            return
        if not self.online:
            self._log_table(line)
        elif self._table is None or not self._table.is_alive():
            self._table = threading.Thread(target=self._try_table, args=(line,), daemon=True)
            self._table.start()

    def _try_table(self, line: Mapping[str, Any]) -> None:
        # a refused table, or one that is late for the end of the run; rollouts/ has its rows
        with contextlib.suppress(Exception):
            self._log_table(line)

    def _log_table(self, line: Mapping[str, Any]) -> None:
        import wandb

        # a key for each step, because W&B shows the last table of a key only
        rows = line["rows"]
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({f"{line['name']}/step_{line['step']:06d}": table, "_timestamp": self._time}, commit=False)

    def catch_up(self) -> int:
        """Send what the run folder holds and the server does not; returns the number of steps sent.

        A table goes into the row of its step, so the two files are read side by side.
        """
        tables: dict[int, list[dict]] = {}
        for table in read_lines(self.folder / "tables.jsonl"):
            tables.setdefault(table["step"], []).append(table)
        sent = 0
        if 0 in self._evaluations:
            self.send_evaluation(0, self._evaluations[0])
        for line in read_lines(self.folder / "metrics.jsonl"):
            if line["step"] < self.first:
                continue
            self.send(line)
            for table in tables.get(line["step"], []):
                self._log_table(table)
            if line["step"] in self._evaluations:
                self.send_evaluation(line["step"], self._evaluations[line["step"]])
            sent += 1
        return sent

    def finish(self, summary: Mapping[str, float], failed: bool) -> bool:
        """Close the run and wait for the uploads, ``finish_timeout`` seconds at most; returns whether the server has it all."""
        if self._table is not None:
            self._table.join(timeout=min(10.0, self._finish_timeout))
        self._run.summary.update({**endings(self.folder), **summary})
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            return False
        # wandb gives up on a refused upload with a warning only; its log is where that can be read
        log = Path(self._run.dir).parent / "logs" / "debug-internal.log"
        return self.online and not (log.exists() and "fatal error" in log.read_text(errors="replace"))

    @property
    def url(self) -> str:
        return self._run.url

    def _segments(self) -> list[Path]:
        return [path for path in (self.folder / "wandb").glob("*run-*") if not path.is_symlink()]

    def _remove_empty(self, there: set[Path]) -> None:
        """Remove what a failed start left: a folder without a record in it, and the links to it."""
        for path in set(self._segments()) - there:
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.folder / "wandb").glob("*"):
            if path.is_symlink() and not path.exists():
                path.unlink()
