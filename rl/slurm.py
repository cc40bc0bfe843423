"""Slurm: the script of a training or of a sweep, and what becomes of its jobs. Works with and without accounting (sacct)."""

from __future__ import annotations

import os
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from rl.errors import ConfigError
from rl.paths import slurm_dir
from rl.server import server_of
from rl.shadows import acting_plugins
from rl.slurm_site import check, directive, lines


class _Script(string.Template):
    """``@{name}`` is filled in; everything else is left to the shell, which has other uses for ``$``."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>[a-z_]+)\}|(?P<escaped>(?!))(?P<named>(?!))(?P<invalid>(?!))"


def render(cfg: DictConfig, run_folder: Path) -> str:
    """The sbatch script that trains the prepared ``run_folder``.

    Raises:
        ConfigError: a ``slurm`` value that sbatch would not take, or a path that it cannot.
    """
    run = Path(run_folder).absolute()
    values = _values(cfg, run.name, run / "logs" / "slurm_%j.out")
    return _fill("train.sbatch", {**values, "run": shlex.quote(str(run))})


def render_array(cfg: DictConfig, sweep_folder: Path, points: Sequence[int]) -> str:
    """The sbatch script that trains some points of a sweep, ``launcher.at_once`` at a time where that is set.

    Args:
        cfg: of any point; all points share its ``engine`` and ``slurm``.
        points: numbers of lines, from 1, of ``sweep_folder/points.txt``, which holds the points' run folders.

    Raises:
        ConfigError: as :func:`render`.
    """
    sweep = Path(sweep_folder).absolute()
    values = _values(cfg, sweep.name, sweep / "logs" / "slurm_%A_%a.out")
    at_once = f"%{cfg.launcher.at_once}" if cfg.launcher.at_once else ""
    array = {"array": ",".join(map(str, points)) + at_once, "points": shlex.quote(str(sweep / "points.txt"))}
    return _fill("sweep.sbatch", {**values, **array})


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _Script((slurm_dir() / template).read_text(encoding="utf-8")).substitute(values)


def _values(cfg: DictConfig, name: str, log: Path) -> dict[str, str]:
    from rl.engine import engine

    check(cfg)
    node, found = cfg.slurm, engine(cfg, here=False)
    serves = server_of(cfg)
    cpus = node.cpus_per_task
    python = shlex.quote(node.python or ("python" if node.container else sys.executable))
    if node.container:
        python = f"{node.container} {python}"
    step = [f"--cpus-per-task={cpus}"] if cpus else []  # srun does not take it over from sbatch (since Slurm 22.05)
    values = {
        "job_name": directive(name),
        "log": directive(str(log.parent).replace("%", "%%") + "/" + log.name),
        "job_nodes": str(found.nodes + (1 if serves else 0)),
        "nodes": str(found.nodes),
        "processes": str(found.processes),
        "tasks": str(found.world),
        "signal_seconds": str(node.signal_seconds),
        "options": "\n".join(f"#SBATCH {option}" for option in _options(node)),
        "step_options": " ".join(step + (['--exclude="$server"'] if serves else [])),
        "folder": shlex.quote(os.getcwd()),
        "setup": "\n".join(_modules(node) + lines(node.setup)),
        "python": python,
        "server": "",
    }
    if serves:
        # on a node of its own, so it listens there for the others
        everywhere = replace(serves, host="0.0.0.0", url=f"http://0.0.0.0:{serves.port}")
        server = {
            "server_options": f"--cpus-per-task={cpus * found.processes}" if cpus else "",
            "serve": shlex.join(everywhere.command()[1:]),
            "port": str(everywhere.port),
        }
        values["server"] = _fill("server.sh", {**values, **server})
    values["body"] = _fill("body.sh", values)
    return values


def _options(node: DictConfig) -> list[str]:
    asked = {
        "partition": node.partition,
        "account": node.account,
        "qos": node.qos,
        "time": node.time,
        "cpus-per-task": node.cpus_per_task,
        "mem": node.mem,
        "gpus-per-node": node.gpus_per_node,
    }
    return [f"--{k}={directive(str(v))}" for k, v in asked.items() if v is not None] + lines(node.extra)


def _modules(node: DictConfig) -> list[str]:
    names = " ".join(shlex.quote(str(m)) for m in lines(node.modules))
    return ["type module >/dev/null 2>&1 || source /etc/profile", f"module load {names}"] if names else []


def submit_run(cfg: DictConfig, overrides: Sequence[str], argv: Sequence[str], show: bool) -> None:
    """Prepare a run folder and submit it with a script of its own, ``job.sbatch``; say where to look.

    Args:
        overrides, argv: what was typed. show: only print the script, and write nothing.

    Raises:
        ConfigError: what stops the run, or sbatch does not take it; then nothing stays behind. RunExistsError: the name is taken.
    """
    from rl import prepare, rundir

    check(cfg)
    if show:
        prepare.check(cfg, here=False)
        name = cfg.run.name or rundir.run_name(cfg.model.name, cfg.data.name, acting_plugins(cfg), cfg.seed)
        print(render(cfg, Path(cfg.run.dir) / name), end="")
        return
    _require("sbatch")
    old = prepare.to_resume(cfg)
    if old and (alive := _alive(rundir.read_manifest(old).get("slurm_jobs", []))):
        raise ConfigError(f"{old}: its job {alive[0]} has not ended. Wait for it, or end it first: scancel {alive[0]}.")
    folder = old or prepare.prepare(cfg, overrides, argv, here=False)
    try:
        rundir.write_text(folder / "job.sbatch", render(cfg, folder))
        job = submit(folder / "job.sbatch")
    except ConfigError:
        if not old:
            shutil.rmtree(folder)
        raise
    jobs = rundir.read_manifest(folder).get("slurm_jobs", [])
    rundir.update_manifest(folder, {"slurm_jobs": [*jobs, job]})
    print(f"job       {job}")
    print(f"run       {folder}")
    print(f"log       {folder}/logs/slurm_{job}.out")
    print(f"look      squeue -j {job}; tail -F {shlex.quote(f'{folder}/logs/slurm_{job}.out')}")
    print(f"stop      scancel {job}")
    print(f"again     sbatch {shlex.quote(f'{folder}/job.sbatch')}    goes on from the newest checkpoint")


def submit(script: Path) -> str:
    """Hand a script to sbatch and give the id of its job. Logs go to ``logs/`` beside the script.

    Raises:
        ConfigError: no sbatch on this machine, or sbatch does not take it.
    """
    (Path(script).parent / "logs").mkdir(exist_ok=True)
    return _slurm("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def states(jobs: Iterable[str]) -> dict[str, str]:
    """What Slurm knows of jobs, in its words: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...

    Args:
        jobs: ``"123"``, which for an array stands for all its tasks, or ``"123_4"``.

    Returns:
        One entry a job, or a task of an array; one that Slurm has forgotten is absent.

    Raises:
        ConfigError: no Slurm on this machine, or its controller does not answer.
    """
    asked = set(jobs)
    if not asked:
        return {}
    found = _table(_slurm("squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i|%T"), asked)
    if shutil.which("sacct"):  # squeue forgets after a few minutes; accounting, where there is any, does not
        past = _run("sacct", "-nXP", "--format=JobID,State", f"--jobs={','.join(sorted(asked))}")
        found = (_table(past.stdout, asked) if past.returncode == 0 else {}) | found
    return found


def _table(text: str, asked: set[str]) -> dict[str, str]:
    rows = (line.split("|") for line in text.splitlines() if "|" in line)
    named = ((name, state.split()[0]) for names, state in rows for name in _tasks(names))  # "CANCELLED by 1000"
    return {name: state for name, state in named if _belongs(name, asked)}


def _tasks(name: str) -> list[str]:
    """``3_[1,4-6%2]``, how sacct writes tasks that never started, as ``3_1``, ``3_4``, ``3_5``, ``3_6``."""
    job, bracket, listed = name.partition("_[")
    if not bracket:
        return [name]
    ends = (part.partition("-") for part in listed.rstrip("]").partition("%")[0].split(","))
    return [f"{job}_{i}" for first, _, last in ends for i in range(int(first), int(last or first) + 1)]


def _belongs(name: str, asked: set[str]) -> bool:
    return name in asked or name.partition("_")[0] in asked


def cancel(jobs: Iterable[str]) -> None:
    """End jobs; those that ended already stay as they are.

    Raises:
        ConfigError: no Slurm on this machine, or it does not let you.
    """
    if alive := _alive(jobs):
        _slurm("scancel", "--quiet", *alive)


_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
}


def _alive(jobs: Iterable[str]) -> list[str]:
    return [job for job, state in states(jobs).items() if state not in _ENDED]


def _slurm(command: str, *arguments: str) -> str:
    _require(command)
    done = _run(command, *arguments)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise ConfigError(f"{said.rstrip('.')}. That is what Slurm's {command} says.")
    return done.stdout


def _require(command: str) -> None:
    if shutil.which(command) is None:
        raise ConfigError(
            f"{command} is not found: this machine has no Slurm. Log in to a cluster; entrl slurm submit --dry-run shows the script."
        )


def _run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """From inside a job, none of that job's settings are handed on."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True, env=env, timeout=120)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"Slurm's {command} does not answer. Try again when the cluster does.") from None
