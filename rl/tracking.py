"""Where a run's numbers go: ``metrics.jsonl`` always, W&B beside it, offline when there is no key or no network."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from rl.errors import ConfigError
from rl.redact import without_secrets
from rl.wandb_run import Record, WandbRun, about, has_key, new_run_id, read_lines

if TYPE_CHECKING:  # torch takes seconds to import, which entrl sync has no use for
    from rl.dynamics import Histogram

Mode = Literal["auto", "online", "offline", "disabled"]
_SUMMARY_ONLY = re.compile(r"/(low|high)$|/avg@\d+$|/entropy/(p\d+|\w+_quarter)$")


class Tracker:
    """One run's log on the main process. Nothing that W&B does stops a training: what fails there is one warning.

    In a folder with steps in ``metrics.jsonl`` the W&B run of the earlier attempt goes on; steps that the server lacks are sent first.

    Args:
        folder: the run folder. project, entity, name, group, tags: as in W&B.
        mode: "auto" takes WANDB_MODE if set, else online if a key is found, else offline. A failing online start falls back
            to offline under the same id. "disabled" writes metrics.jsonl only.
        config: the resolved configuration; keys that look like secrets are left out.
        run_id: of the W&B run, see :func:`new_run_id`; None: the one this folder had before, else a new one.
        init_timeout, finish_timeout: seconds that W&B may take to start and to deliver the rest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        entity: str | None,
        mode: Mode,
        name: str,
        group: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
    ):
        self.folder = Path(folder)
        mode = resolve_mode(mode)
        self._lines = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._run: WandbRun | None = None
        self._record: Record | None = None
        self._lost = False
        self._said: set[str] = set()
        if mode == "disabled":
            return
        earlier = Record.load(self.folder)
        run_id = run_id or (earlier.id if earlier else new_run_id())
        kept = {}
        if earlier:
            last = last_step(self.folder)  # the training may have gone back behind a later evaluation
            evaluations = {step: m for step, m in (earlier.evaluations or {}).items() if int(step) <= last}
            kept = {"summary": earlier.summary, "evaluations": evaluations}
        self._record = Record(run_id, project, entity, name, group, list(tags), **kept).save(self.folder)
        public = {**without_secrets(config or {}), "entrl": about(self.folder, config or {})}
        timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}

        def start(mode):
            return WandbRun(self.folder, self._record, mode, public, **timeouts)

        if mode == "online":
            self._run = self._try("could not be reached, so this run is recorded offline", lambda: start("online"))
        if self._run is None:
            self._run = self._try("cannot write to the run folder", lambda: start("offline"))
        self._tell("catch up", lambda run: run.catch_up())

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Append one line; numbers that are not finite become null, which every JSON reader understands."""
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        line |= {name: {"counts": h.counts, "edges": [round(e, 6) for e in h.edges]} for name, h in histograms.items()}
        line["time/at"] = round(time.time(), 3)
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        self._tell("take a step", lambda run: run.send(line))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows in W&B; columns of lists are left out. ``tables.jsonl`` keeps them for ``entrl sync``."""
        if self._record is None or not rows:
            return
        columns = [k for k, v in rows[0].items() if not isinstance(v, list)]
        line = {"step": step, "name": name, "rows": [{c: row[c] for c in columns} for row in rows]}
        with open(self.folder / "tables.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        self._tell("take a table", lambda run: run.send_table(line))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Put an evaluation into the history, so that W&B draws it. Bounds, quantiles, and pass@1's second name are in the summary only.

        Args:
            step: of the training, 0 before it. metrics: as ``eval/<set>/pass@1``.
        """
        if self._record is None:
            return
        kept = {name: value for name, value in metrics.items() if not _SUMMARY_ONLY.search(name)}
        if step == 0:  # later ones share the row, and the time, of a training step
            kept["_timestamp"] = round(time.time(), 3)
        every = {**(self._record.evaluations or {}), str(step): kept}
        self._record = self._record.save(self.folder, evaluations=every)
        self._tell("take an evaluation", lambda run: run.send_evaluation(step, kept))

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the user where the run is online; one that fails is lost, the run is not."""
        if self._run is None:
            return
        try:
            self._run.alert(title, text)
        except Exception as error:  # of any kind, as in _try
            print(f"W&B could not send the alert {title!r} ({_reason(error)}).")

    def finish(self, summary: Mapping[str, float], failed: bool = False) -> None:
        """Close the files; ``summary`` stays on the W&B run."""
        if self._lines.closed:
            return
        self._lines.close()
        if self._record is None:
            return
        kept = {**(self._record.summary or {}), **summary}
        self._record = self._record.save(self.folder, summary=kept, failed=failed)
        arrived = self._tell("finish", lambda run: run.finish(kept, failed))
        if arrived and not self._lost:
            self._record.save(self.folder, delivered=last_step(self.folder))
        else:
            self._lost = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if kind is not None:
            self.finish({}, failed=True)

    @property
    def id(self) -> str | None:
        return self._record.id if self._record is not None else None

    @property
    def where(self) -> str | None:
        """The page of a run that W&B has, or the command that delivers it; known for certain after :meth:`finish`."""
        if self._record is None:
            return None
        if self._run is not None and self._run.online and not self._lost:
            return self._run.url
        return f"entrl sync {shlex.quote(str(self.folder))}"

    def _tell(self, what: str, action: Callable[[WandbRun], Any]) -> Any:
        if self._run is not None:
            return self._try(f"could not {what}", lambda: action(self._run))
        return None

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # of any kind: wandb is a network client with a process of its own
            self._lost = True
            if what not in self._said:
                self._said.add(what)
                print(f"W&B {what} ({_reason(error)}). Nothing is lost: entrl sync delivers it.")
            return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def last_step(folder: Path) -> int:
    """The last step in a run folder's ``metrics.jsonl``, 0 without any."""
    return max((line["step"] for line in read_lines(Path(folder) / "metrics.jsonl")), default=0)


def resolve_mode(mode: Mode) -> Mode:
    """ "auto" as documented in :class:`Tracker`; the others as they are.

    Raises:
        ConfigError: a mode that does not exist, in the configuration or in WANDB_MODE.
    """
    wanted, source = mode, "logger.mode"
    if mode == "auto":
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # wandb itself fails on an empty one
            return "online" if has_key() else "offline"
        wanted, source = os.environ["WANDB_MODE"], "WANDB_MODE"
    if wanted not in ("online", "offline", "disabled"):
        raise ConfigError(f"{source}={wanted} is not known. Expected online, offline or disabled.")
    return wanted
