"""``entrl sweep`` and ``entrl sweep retry``: the composition root of a sweep."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl import prepare, rundir, slurm
from rl.config import compose, override_value
from rl.engine import engine
from rl.errors import CRASHED, DONE, LEFT, REQUEUE, ConfigError, user_errors
from rl.sweep import folder as folders
from rl.sweep import points as of
from rl.sweep import status
from rl.sweep.local import LAUNCH, Ended, Local, visible_gpus
from rl.sweep.search import Search, Settings, corners, optuna_or_error, settings
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
    if request.search is not None:
        return _search(request, config_dir, argv, command)
    words = of.expand(request)
    configs = of.compose_all(words, config_dir)
    points = of.name_points(words, configs)
    first = configs[0]
    folder = Path(first.run.dir) / folders.sweep_name(request.name, request.named, list(points[0].varies))
    folders.check_free(folder)
    for point, cfg in zip(points, configs, strict=True):
        _own(point, cfg, folder)
    check(points, configs)
    if first.dry_run:
        for point in points:
            print(f"{point.folder}: {' '.join(point.overrides)}")
        print(f"dry run: {len(points)} points would go to {folder}; nothing was started or written.")
        return 0
    write(folder, points, configs, argv)
    print(f"sweep      {folder}, {len(points)} points")
    if first.launcher.name == "local":
        return _run(folder, iter(points), first, command)
    try:
        return _submit(folder, points, first)
    except ConfigError:
        shutil.rmtree(folder)
        raise


def _own(point: of.Point, cfg: DictConfig, folder: Path) -> None:
    """Set what the sweep decides in a point's configuration."""
    cfg.run.dir, cfg.run.name, cfg.run.group = str(folder), point.folder, cfg.run.group or folder.name


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


def _run(
    folder: Path, points: Iterator[of.Point], cfg: DictConfig, command: Sequence[str], search: Search | None = None
) -> int:
    """Run points on this machine, show them, and give the exit code."""
    at_once = cfg.launcher.at_once
    local = Local(folder, at_once, visible_gpus() if at_once > 1 else (), engine(cfg).processes, command)
    with Watch(folder) as watch:

        def ended(end: Ended) -> None:
            watch.ended(end, settle(folder / end.point.folder, end.code))
            if search is not None:
                search.ended(end.point)

        codes = {end.code for end in local.run(points, watch.started, ended, watch)}
    status.show(folder, status.standings(folder))
    if local.leaving:
        return LEFT
    if codes - {DONE, REQUEUE, LEFT}:
        return CRASHED
    return REQUEUE if local.stopping or codes - {DONE} else DONE


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
    if (search := folders.read_sweep(folder)["search"]) is not None:
        return _search_on(folder, search, again, overrides, command)
    if not again:
        print(f"{folder}: {status.counts(found)}; nothing to run again.")
        return 0
    cfg = _changed(prepare.read(folder / again[0].folder), overrides)
    print(f"sweep      {folder}, {len(again)} of {len(found)} points again")
    if cfg.launcher.name == "slurm":
        return _submit(folder, again, cfg)
    return _run(folder, iter(again), cfg, command)


def _changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key = of.override_key(override)
        if not key.startswith("slurm.") and key != "launcher.at_once":
            raise ConfigError(
                f"{override}: a retry runs the points as they are. Only slurm.* and launcher.at_once may change."
            )
    OmegaConf.set_struct(cfg, True)
    try:
        for override in overrides:
            OmegaConf.update(cfg, of.override_key(override), override_value(override))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override}: {str(error).splitlines()[0]}. See all: entrl show --full.") from error
    of.check_launcher(cfg.launcher)
    return cfg


def _search(request: of.Request, config_dir: str | None, argv: Sequence[str], command: Sequence[str]) -> int:
    asked = settings(request.search, request.trials)
    configs = corners(request.overrides, config_dir)
    first = configs[0]
    of.check_launcher(first.launcher)
    if first.launcher.name != "local":
        raise ConfigError(
            "a search looks at what came out before it proposes the next point, and a job array does not wait. Use launcher=local, "
            "on a cluster inside one job: sbatch --wrap 'entrl sweep ...'."
        )
    folder = Path(first.run.dir) / folders.sweep_name(request.name, request.named, [])
    folders.check_free(folder)
    points = [of.Point(n, f"{n:03d}", [], {}, None) for n in range(1, len(configs) + 1)]
    check(points, configs)
    if first.dry_run:
        print(f"dry run: {asked.trials} trials would go to {folder}; nothing was started or written.")
        return 0
    optuna_or_error()
    rundir.create(folder.parent, folder.name, overwrite=False)
    search = {"optuna": asked._asdict(), "overrides": request.overrides, "config_dir": config_dir}
    folders.write_sweep(folder, [], "local", argv, search)
    print(f"search     {folder}, {asked.trials} trials, {asked.direction} {asked.metric}")
    return _run_search(folder, search, asked, first, [], command)


def _search_on(
    folder: Path, search: Mapping[str, Any], again: Sequence[of.Point], overrides: Sequence[str], command: Sequence[str]
) -> int:
    trials = [o.partition("=")[2] for o in overrides if o.startswith("sweep.trials=")]
    asked = settings(search["optuna"], of.whole("sweep.trials", trials[-1]) if trials else None)
    cfg = corners(search["overrides"], search["config_dir"])[0]
    cfg = _changed(cfg, [o for o in overrides if not o.startswith("sweep.trials=")])
    known = len(folders.read_points(folder))
    print(f"search     {folder}, {len(again)} points again and up to {max(0, asked.trials - known)} new ones")
    return _run_search(folder, search, asked, cfg, again, command)


def _run_search(
    folder: Path,
    search: Mapping[str, Any],
    asked: Settings,
    cfg: DictConfig,
    again: Sequence[of.Point],
    command: Sequence[str],
) -> int:
    def make(point: of.Point) -> DictConfig:
        made = compose(point.overrides, search["config_dir"])
        _own(point, made, folder)
        check([point], [made])
        write_run(point, made)
        return made

    study = Search(folder, search["overrides"], asked, make)
    code = _run(folder, study.points(again), cfg, command, study)
    if (best := study.best()) is not None:
        point = folders.read_points(folder)[best[0] - 1]
        print(f"best       {folder / point.folder}: {asked.metric}={best[1]:.4g}")
        print(f"train it   entrl train {shlex.join(point.overrides)}")
    return code
