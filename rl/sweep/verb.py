"""``entrl sweep``, and its status, retry and cancel: the composition root of a sweep."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl import rundir
from rl.errors import ConfigError, user_errors
from rl.sweep import folder as folders
from rl.sweep import points as of
from rl.sweep import status
from rl.sweep.local import LAUNCH, STOPPED, Local, visible_gpus
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
    return _launch(folder, named, first, command)


def _write(folder: Path, points: Sequence[of.Point], configs: Sequence[DictConfig], argv: Sequence[str]) -> None:
    """The sweep folder with a prepared run folder for each point; all of it or nothing."""
    from rl.prepare import prepare

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
    gpus = visible_gpus()
    local = Local(folder, at_once, gpus if at_once > 1 else (), cfg.engine.processes, command)
    with Watch(folder) as watch:

        def ended(end) -> None:
            watch.ended(end, settle(folder / end.point.folder, end.code))

        done = local.run(iter(points), watch.started, ended, watch)
    found = status.standings(folder)
    status.show(folder, found)
    return exit_code(local.signals, [end.code for end in done])


def exit_code(signals: int, codes: Sequence[int]) -> int:
    """Of a launcher: 1 when a point failed, 130 when it was left at once, 85 when it was stopped and can go on, else 0."""
    if signals > 1:
        return 130
    if any(code not in (0, STOPPED) for code in codes):
        return 1
    return STOPPED if signals or STOPPED in codes else 0


def settle(run: Path, code: int) -> str:
    """What became of a run that ended; one that failed without a word gets its FAILED marker here."""
    state = rundir.state(run)
    if state == "open" and code not in (0, STOPPED, 130):
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        rundir.finish(run, f"{why}, before it could say more; see logs/launch.log")
        return "failed"
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


def show_status(target: str) -> int:
    """Print how a sweep stands."""
    folder = folders.find(target)
    status.show(folder, status.standings(folder))
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
    cfg = _changed(OmegaConf.load(folder / again[0].folder / "config.yaml"), overrides)
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


def cancel(target: str) -> int:
    """Stop what runs and take back what waits; points on this machine end at a step boundary, a second cancel ends them at once."""
    folder = folders.find(target)
    found = status.standings(folder)
    processes = folders.Processes(folder)
    if elsewhere := processes.elsewhere():
        raise ConfigError(f"{folder} runs on {elsewhere}. Cancel it there.")
    jobs = [job["job"] for job in folders.read_sweep(folder)["jobs"]]
    waiting = [s for s in found if s.state in status.LIVE]
    if not waiting:
        print(f"{folder}: {status.counts(found)}; nothing runs.")
        return 0
    if jobs:
        from rl import slurm

        slurm.cancel(jobs)
    launcher = processes.launcher()
    # the launcher passes it on; where it was killed, its points are still there
    for pid in [launcher] if launcher is not None else processes.points().values():
        os.kill(pid, signal.SIGTERM)
    print(f"{folder}: asked {len(waiting)} points to stop. See entrl sweep status {folder}.")
    return 0
