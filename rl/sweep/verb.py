"""``entrl sweep`` and ``entrl sweep retry``: the composition root of a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl import prepare, rundir, slurm
from rl.engine import engine
from rl.errors import CRASHED, DONE, LEFT, REQUEUE, ConfigError, user_errors
from rl.sweep import folder as folders
from rl.sweep import points as of
from rl.sweep import status
from rl.sweep.local import LAUNCH, Ended, Local, visible_gpus
from rl.sweep.watch import Watch


def sweep(
    overrides: Sequence[str], config_dir: str | None, argv: Sequence[str], command: Sequence[str] = LAUNCH
) -> int:
    """Run every combination of the choices in ``overrides``; the exit code is 0 when all are done or handed to Slurm.

    Args:
        command: starts a point on this machine when its run folder is added.

    Raises:
        ConfigError: any point that could not run; nothing is left behind.
    """
    request = of.read_request(overrides, config_dir)
    words = of.expand(request)
    configs = of.compose_all(words, config_dir)
    points = of.name_points(words, configs)
    first = configs[0]
    folder = Path(first.run.dir) / folders.sweep_name(request.name, request.named, list(points[0].varies))
    folders.check_free(folder)
    for point, cfg in zip(points, configs, strict=True):
        for key, value in _own(point, cfg, folder).items():
            OmegaConf.update(cfg, key, value)
    check(points, configs)
    if first.dry_run:
        for point in points:
            print(f"{point.folder}: {' '.join(point.overrides)}")
        print(f"dry run: {len(points)} points would go to {folder}; nothing was started or written.")
        return 0
    write(folder, points, configs, argv)
    print(f"sweep      {folder}, {len(points)} points")
    if first.launcher.name == "local":
        return _run(folder, points, first, command)
    try:
        return _submit(folder, points, first)
    except ConfigError:
        shutil.rmtree(folder)
        raise


def _own(point: of.Point, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """What the sweep sets in a point's configuration."""
    own = {"run.dir": str(folder), "run.name": point.folder, "run.group": cfg.run.group or folder.name}
    if cfg.launcher.name == "slurm" and cfg.engine.processes is None:
        own["engine.processes"] = slurm.gpus_per_node(cfg)
    return own


def check(points: Sequence[of.Point], configs: Sequence[DictConfig]) -> None:
    """Find everything that would stop a point.

    Raises:
        ConfigError: there is something; it names the points.
    """
    flaws = {}
    for point, cfg in zip(points, configs, strict=True):
        try:
            prepare.check(cfg, here=cfg.launcher.name == "local")
        except user_errors() as error:
            flaws[point.number] = str(error)
    of.raise_flaws(flaws, len(points))


def write(folder: Path, points: Sequence[of.Point], configs: Sequence[DictConfig], argv: Sequence[str]) -> None:
    """Make the folder of a sweep, with a run folder for each point; all of it or nothing."""
    rundir.create(folder.parent, folder.name, overwrite=False)
    try:
        for point, cfg in zip(points, configs, strict=True):
            write_run(point, cfg)
        folders.write_sweep(folder, points, configs[0].launcher.name, argv)
    except BaseException:
        shutil.rmtree(folder)
        raise


def write_run(point: of.Point, cfg: DictConfig) -> None:
    """Write the run folder of a point; its command.sh runs it again by itself."""
    own = {f"run.{key}": cfg.run[key] for key in ("dir", "name", "group")}
    words = [o for o in point.overrides if of.override_key(o) not in own]
    words += [f"{key}={_quoted(value)}" for key, value in own.items()]
    prepare.write(cfg, words, ["train", *words], engine(cfg, cfg.launcher.name == "local"))


def _quoted(value: str) -> str:
    """A value as Hydra reads it back, whatever is in it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _run(folder: Path, points: Sequence[of.Point], cfg: DictConfig, command: Sequence[str]) -> int:
    at_once = cfg.launcher.at_once
    local = Local(folder, at_once, visible_gpus() if at_once > 1 else (), engine(cfg).processes, command)
    with Watch(folder) as watch:

        def ended(end: Ended) -> None:
            watch.ended(end, settle(folder / end.point.folder, end.code))

        done = local.run(iter(points), watch.started, ended, watch)
    status.show(folder, status.standings(folder))
    if local.leaving:
        return LEFT
    if any(end.code not in (DONE, REQUEUE) for end in done):
        return CRASHED
    return REQUEUE if local.stopping or any(end.code == REQUEUE for end in done) else DONE


def settle(run: Path, code: int) -> str:
    """What became of a run that ended; one that failed without a word gets its FAILED marker here."""
    if rundir.state(run) == "open" and code not in (DONE, REQUEUE, LEFT):
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        rundir.finish(run, "FAILED", f"{why}, and no other word; see logs/launch.log")
    state = rundir.state(run)
    return "lost" if state == "open" else state


def _submit(folder: Path, points: Sequence[of.Point], cfg: DictConfig) -> int:
    numbers = [point.number for point in points]
    script = folder / f"job_{len(folders.read_sweep(folder)['jobs']) + 1}.sbatch"
    rundir.write_text(script, slurm.render_array(cfg, folder, numbers))
    job = slurm.submit(script)
    folders.add_job(folder, job, numbers)
    print(f"job        {job}, {len(numbers)} tasks of one array; nothing here needs to stay open")
    print(f"look       entrl sweep status {folder}")
    print(f"stop       entrl sweep cancel {folder}")
    return 0


def retry(target: str, overrides: Sequence[str], command: Sequence[str] = LAUNCH) -> int:
    """Run again what failed, stopped, got lost or never started; each goes on from its checkpoint where it has one.

    Args:
        overrides: ``slurm.*`` and ``launcher.at_once`` may be changed, as a longer time limit.

    Raises:
        ConfigError: another override.
    """
    folder = folders.find(target)
    found = status.standings(folder)
    again = [s.point for s in found if s.state in status.AGAIN]
    if not again:
        print(f"{folder}: {status.counts(found)}; nothing to run again.")
        return 0
    cfg = _changed(prepare.read(folder / again[0].folder), overrides)
    of.check_launcher(cfg.launcher)
    print(f"sweep      {folder}, {len(again)} of {len(found)} points again")
    if cfg.launcher.name == "slurm":
        return _submit(folder, again, cfg)
    return _run(folder, again, cfg, command)


def _changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key = of.override_key(override)
        if not key.startswith("slurm.") and key != "launcher.at_once":
            raise ConfigError(
                f"{override}: a retry runs the points as they are. Only slurm.* and launcher.at_once may change."
            )
    OmegaConf.set_struct(cfg, True)
    try:
        return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{' '.join(overrides)}: {str(error).splitlines()[0]}. See all: entrl show --full."
        ) from error
