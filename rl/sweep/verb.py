"""``entrl sweep`` and ``entrl sweep retry``: the composition root of a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl import rundir
from rl.errors import CRASHED, DONE, LEFT, REQUEUE, ConfigError, user_errors
from rl.prepare import prepare, read
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
    named = of.name_points(words, configs)
    first = configs[0]
    folder = Path(first.run.dir) / folders.sweep_name(request.name, request.named, list(named[0].varies))
    folders.check_free(folder)
    if first.dry_run:
        for point in named:
            print(f"{point.folder}: {' '.join(point.overrides)}")
        print(f"dry run: {len(named)} points would go to {folder}; nothing was started or written.")
        return 0
    _write(folder, named, configs, argv)
    print(f"sweep      {folder}, {len(named)} points")
    return _launch(folder, named, read(folder / named[0].folder), command)


def _write(folder: Path, points: Sequence[of.Point], configs: Sequence[DictConfig], argv: Sequence[str]) -> None:
    """The sweep folder with a prepared run folder for each point; all of it or nothing."""
    first = configs[0]
    rundir.create(folder.parent, folder.name, overwrite=False)
    flaws: dict[int, str] = {}
    try:
        for point, cfg in zip(points, configs, strict=True):
            own = {"run.dir": str(folder), "run.name": point.folder, "run.group": cfg.run.group or folder.name}
            for key, value in own.items():
                OmegaConf.update(cfg, key, value)
            words = [
                *(o for o in point.overrides if of.override_key(o) not in own),
                *(f"{k}={_quoted(v)}" for k, v in own.items()),
            ]
            try:
                prepare(cfg, words, ["train", *words], here=first.launcher.name == "local")
            except user_errors() as error:
                flaws[point.number] = str(error)
        of.raise_flaws(flaws, len(points))
        folders.write_sweep(folder, points, first.launcher.name, first.launcher.at_once, argv)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _quoted(value: str) -> str:
    """A value as Hydra reads it back, whatever is in it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _launch(folder: Path, points: Sequence[of.Point], cfg: DictConfig, command: Sequence[str]) -> int:
    if cfg.launcher.name == "slurm":
        return _submit(folder, points, cfg)
    at_once = cfg.launcher.at_once
    local = Local(folder, at_once, visible_gpus() if at_once > 1 else (), cfg.engine.processes, command)
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
    from rl import slurm

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
    cfg = _changed(read(folder / again[0].folder), overrides)
    print(f"sweep      {folder}, {len(again)} of {len(found)} points again")
    return _launch(folder, again, cfg, command)


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
