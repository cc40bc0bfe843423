"""From a configuration to a run folder that any launcher can start: ``rl.launch``, torchrun or srun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from rl import rundir
from rl.config import BOOKKEEPING, differences
from rl.engine import Engine, engine, write_deepspeed
from rl.errors import CheckpointError, ConfigError
from rl.paths import configs_dir
from rl.preflight.brief import Ready, before_training, settings_only
from rl.redact import without_secrets
from rl.shadows import acting_plugins


def prepare(cfg: DictConfig, overrides: Sequence[str], argv: Sequence[str], here: bool = True) -> Path:
    """Check ``cfg`` and write the folder of a new run.

    Args:
        overrides, argv: what was typed, to be kept. here: whether the run will be on this machine; if not, only what any machine can tell
            is checked, and the ranks check the rest.

    Raises:
        ConfigError: what stops the run, a line each. RunExistsError: the name is taken.
    """
    refuse_secrets(cfg)
    check(cfg, here)
    return write(cfg, overrides, argv, engine(cfg, here))


def check(cfg: DictConfig, here: bool = True) -> Ready | None:
    """Everything that would stop the run, found before anything is written; what was made for it, where it is ``here``."""
    name = cfg.run.name
    if isinstance(name, str):
        rundir.check_free(Path(cfg.run.dir), name, cfg.run.overwrite)
    if here:
        return before_training(cfg)
    settings_only(cfg)
    return None


def refuse_secrets(cfg: DictConfig) -> None:
    """Raise ConfigError for a secret in ``cfg``: other processes read the run folder, which holds none."""
    public = OmegaConf.create(without_secrets(OmegaConf.to_container(cfg)))
    if secrets := [key for key, (_, value) in differences(cfg, public).items() if value is not None]:
        raise ConfigError(
            f"{secrets[0]} is a secret, which no run folder holds, and the run's processes read theirs there. Give it in the environment "
            "instead, as HF_TOKEN or WANDB_API_KEY."
        )


def write(cfg: DictConfig, overrides: Sequence[str], argv: Sequence[str], found: Engine) -> Path:
    """Write the run folder: config.yaml with name and processes filled in, and what else says what will run."""
    name = cfg.run.name or rundir.run_name(cfg.model.name, cfg.data.name, acting_plugins(cfg), cfg.seed)
    filled = OmegaConf.merge(cfg, {"run": {"name": name}, "engine": {"processes": found.processes}})
    folder = rundir.create(Path(cfg.run.dir), name, cfg.run.overwrite)
    public = OmegaConf.create(without_secrets(OmegaConf.to_container(filled)))
    write_deepspeed(folder, found)
    rundir.describe(folder, OmegaConf.to_yaml(public), overrides, argv, cfg.seed)  # its manifest is the last file
    return folder


_NODES = (
    "run",
    "engine",
    "model",
    "data",
    "reward",
    "plugin",
    "trainer",
    "rollout",
    "checkpoint",
    "eval",
    "record",
    "logger",
)


def read(folder: Path) -> DictConfig:
    """The configuration of a run folder; what an earlier entrl did not know to record is as the default has it.

    Raises:
        CheckpointError: it is no run folder, or its config.yaml is no configuration.
    """
    path = rundir.prepared(Path(folder)) / "config.yaml"
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OSError) as error:
        raise CheckpointError(f"{path} cannot be used: {str(error).splitlines()[0]}. Was it edited?") from error
    if missing := [node for node in _NODES if node not in cfg]:
        raise CheckpointError(f"{path} cannot be used: {missing[0]} is missing. Was it edited?")
    cfg.record = OmegaConf.merge(OmegaConf.load(configs_dir() / "record" / "default.yaml"), cfg.record)
    return cfg


_FREE = (*BOOKKEEPING, "trainer.max_steps")  # what may differ when a run goes on


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def to_resume(cfg: DictConfig) -> Path | None:
    """The run folder to go on with under ``resume=auto``, its configuration brought up to date; None for a new run.

    Raises:
        ConfigError: resume without a name, with settings that would make it another run, or of a run that is going on.
    """
    if cfg.resume not in ("never", "auto"):
        raise ConfigError(f"resume={cfg.resume} is not known. Expected auto or never.")
    if cfg.resume == "never":
        return None
    if not isinstance(cfg.run.name, str):
        raise ConfigError("resume=auto does not know which run. Give its name: run.name=...")
    folder = Path(cfg.run.dir) / cfg.run.name
    if not folder.exists():
        return None
    before = read(folder)
    filled = cfg.copy()
    if cfg.engine.processes is None:
        filled.engine.processes = before.engine.processes
    public = OmegaConf.create(without_secrets(OmegaConf.to_container(filled)))
    changed = differences(public, before)
    if others := [key for key in changed if not _free(key)]:
        old, new = changed[others[0]]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{folder} was started with {others[0]}={old}, not {new}{more}. Give the same settings, or another run.name, or go on as it "
            f"was: entrl resume {folder}."
        )
    if changed and not cfg.dry_run:
        with rundir.held(folder):
            rundir.write_text(folder / "config.yaml", OmegaConf.to_yaml(public))
    return folder
