"""Where a run's numbers go: ``metrics.jsonl`` always, W&B beside it, offline when there is no key or no network."""

from __future__ import annotations

import json
import math
import netrc
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlparse

from rl.dynamics import Histogram
from rl.errors import ConfigError

Mode = Literal["auto", "online", "offline", "disabled"]

_SECRET_WORDS = ("api_key", "apikey", "access_key", "private_key", "password", "passwd", "secret", "credential")


class Tracker:
    """One run's log on the main process.

    Args:
        folder: the run folder. project, entity, name, group, tags: as in W&B.
        mode: "auto" takes WANDB_MODE if set, else online if a key is found, else offline. A failing online start falls back
            to offline. "disabled" writes metrics.jsonl only.
        config: the resolved configuration; keys that look like secrets are left out.
        run_id: continue this W&B run.
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
    ):
        self.folder = Path(folder)
        self._lines = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._run = None
        mode = resolve_mode(mode)
        if mode != "disabled":
            self._run = _start(
                self.folder, mode, project, entity, name, group, tags, without_secrets(config or {}), run_id
            )

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Append one line; numbers that are not finite become null, which every JSON reader understands."""
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        line |= {name: {"counts": h.counts, "edges": [round(e, 6) for e in h.edges]} for name, h in histograms.items()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if self._run is not None:
            import wandb

            shown = {name: wandb.Histogram(np_histogram=(h.counts, h.edges)) for name, h in histograms.items()}
            self._run.log({**metrics, **shown, "train/global_step": step}, step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table under its own key for each step, so that every one stays browsable in W&B."""
        if self._run is not None and rows:
            import wandb

            columns = [k for k, v in rows[0].items() if not isinstance(v, list)]
            table = wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
            self._run.log({f"{name}/step_{step:06d}": table}, step=step)

    def finish(self, summary: Mapping[str, float], failed: bool = False) -> None:
        """Close the files; ``summary`` stays on the W&B run."""
        self._lines.close()
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=1 if failed else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if kind is not None:
            self.finish({}, failed=True)

    @property
    def id(self) -> str | None:
        return self._run.id if self._run is not None else None

    @property
    def where(self) -> str | None:
        """The page of an online run, or the command that uploads an offline one."""
        if self._run is None:
            return None
        if self._run.settings.mode == "online":
            return self._run.url
        return f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"


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


def has_key() -> bool:
    """Whether a W&B key is in the environment or in the netrc file; it is never read out."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(folder, mode, project, entity, name, group, tags, config, run_id):
    import wandb

    settings = wandb.Settings(init_timeout=30, finish_timeout=60, silent=True, console="off", x_disable_stats=True)
    arguments = {
        "project": project,
        "entity": entity,
        "name": name,
        "group": group,
        "tags": list(tags),
        "config": config,
        "dir": str(folder),
        "id": run_id,
        "resume": "allow" if run_id else None,
        "settings": settings,
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        print(f"W&B could not be reached ({type(error).__name__}); this run is recorded offline.")
        run = wandb.init(mode="offline", **arguments)
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without keys named like a credential, at any depth."""

    def secret(key: str) -> bool:
        key = key.lower()
        # hub_token is a secret, max_completion_tokens, tokenizer and token_level are not
        return any(word in key for word in _SECRET_WORDS) or key.endswith("token")

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_secrets(value)
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in config.items() if not secret(str(key))}
