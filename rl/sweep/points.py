"""From a command line with choices to the points of a sweep: expanded, composed, checked and named before anything is written."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from rl.config import choices, compose, did_you_mean
from rl.errors import ConfigError
from rl.paths import configs_dir

LIMIT = 500  # points a sweep has at most unless told otherwise: a slip of a comma should not fill a cluster
_LONGEST = 100  # characters of a point's folder name


class Request(NamedTuple):
    """What ``entrl sweep`` was asked for; ``search`` is the named sweep's optuna part, ``trials`` replaces its number."""

    overrides: list[str]
    named: str | None
    name: str | None
    limit: int
    trials: int | None
    search: Mapping[str, Any] | None


class Point(NamedTuple):
    """One run of a sweep; ``varies`` holds the keys that differ between points, ``steps`` is None where only the data tells."""

    number: int
    folder: str
    overrides: list[str]
    varies: dict[str, str]
    steps: int | None


def read_request(words: Sequence[str], config_dir: str | None = None) -> Request:
    """Take the sweep's own keys (``sweep=``, ``sweep.name=``, ...) off the overrides and put the named sweep's before them.

    A key on the command line replaces the same key of the named sweep, in its place.

    Raises:
        ConfigError: an unknown key or named sweep, a limit that is no number, a key that the sweep sets itself.
    """
    own: dict[str, str] = {}
    asked: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key == "sweep" or key.startswith("sweep."):
            if key not in _OWN:
                raise ConfigError(
                    f"{key} is not a key of a sweep.{did_you_mean(key, _OWN)} Expected {', '.join(_OWN[:-1])} or {_OWN[-1]}."
                )
            own[key] = value.strip("'\"")
        else:
            if override_key(word) == "run.name":
                raise ConfigError(
                    f"{word}: the points of a sweep name their runs themselves. Name the sweep: sweep.name=."
                )
            if _identity(word) in asked:
                raise ConfigError(
                    f"{key} is given twice: {asked[_identity(word)]} and {word}. Several values are one override: {key}=a,b."
                )
            asked[_identity(word)] = word
    numbers = {key: whole(key, own[key]) for key in ("sweep.limit", "sweep.trials") if key in own}
    named, search, base = own.get("sweep"), None, []
    if named is not None:
        base, search = _named_sweep(named, config_dir)
    if search is None and "sweep.trials" in own:
        raise ConfigError("sweep.trials is for a search, a named sweep with an optuna part. Choose one: sweep=NAME.")
    merged = {_identity(word): word for word in base} | asked
    limit, trials = numbers.get("sweep.limit", LIMIT), numbers.get("sweep.trials")
    return Request(list(merged.values()), named, own.get("sweep.name"), limit, trials, search)


_OWN = ("sweep", "sweep.name", "sweep.limit", "sweep.trials")


def whole(key: str, text: str) -> int:
    """A whole number of at least 1; raises ConfigError for another value."""
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key}={text} does not work. Expected a whole number of at least 1.")
    return int(text)


def override_key(override: str) -> str:
    """``plugin.steer.w_min`` of ``++plugin.steer.w_min=0.8``."""
    return override.partition("=")[0].lstrip("+~")


def _identity(override: str) -> str:
    """What two overrides share when the later replaces the earlier; ``+plugin=a`` adds to ``plugin=[b]`` and does not replace it."""
    key = override.partition("=")[0]
    return key if key.startswith(("+plugin", "+reward", "~")) else override_key(override)


def _named_sweep(name: str, config_dir: str | None) -> tuple[list[str], Mapping[str, Any] | None]:
    folders = [Path(d) / "sweep" for d in (config_dir, configs_dir()) if d is not None]
    known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
    if name not in known:
        raise ConfigError(
            f"sweep={name} does not exist.{did_you_mean(name, known)} Expected one of: {', '.join(known)}; "
            "a sweep of your own is DIR/sweep/NAME.yaml with --config-dir DIR."
        )
    path = next(p for folder in folders if (p := folder / f"{name}.yaml").is_file())
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    search = None
    if isinstance(read, dict) and set(read) == {"overrides", "optuna"}:
        read, search = read["overrides"], read["optuna"]
    if not isinstance(read, list) or not all(isinstance(o, str) for o in read):
        raise ConfigError(
            f"{path} is no sweep. Expected a list of overrides, a line each as - seed=1,2,3; a search has them under overrides: "
            "and its settings under optuna:."
        )
    return read, search


def expand(request: Request) -> list[list[str]]:
    """The overrides of every point, in Hydra's order: the last key varies fastest.

    Raises:
        ConfigError: more than ``request.limit`` points, or an override that cannot be read.
    """
    lists = [choices(override) for override in request.overrides]
    count = 1
    for words in lists:
        count *= len(words)
    if count > request.limit:
        raise ConfigError(
            f"this sweep has {' x '.join(str(len(w)) for w in lists if len(w) > 1)} points, more than sweep.limit={request.limit}. "
            f"If they are meant, sweep.limit={count}."
        )
    return [list(words) for words in itertools.product(*lists)]


def compose_all(points: Sequence[Sequence[str]], config_dir: str | None = None) -> list[DictConfig]:
    """The configuration of every point.

    Raises:
        ConfigError: points that do not compose, all of them; points that are the same run.
    """
    configs, flaws = [], {}
    for number, overrides in enumerate(points, 1):
        try:
            configs.append(compose(overrides, config_dir))
        except ConfigError as error:
            flaws[number] = str(error)
    raise_flaws(flaws, len(points))
    seen: dict[str, int] = {}
    for number, cfg in enumerate(configs, 1):
        content = json.dumps(OmegaConf.to_container(cfg), default=str)
        if (first := seen.setdefault(content, number)) != number:
            raise ConfigError(
                f"points {first} and {number} are the same run: {' '.join(points[number - 1])}. Take one of the choices out."
            )
    for key in ("run.dir", "run.group", "launcher", "slurm"):
        if len({json.dumps(_plain(OmegaConf.select(cfg, key))) for cfg in configs}) > 1:
            raise ConfigError(f"{key} is the same for all points of a sweep. Give it one value.")
    check_launcher(configs[0].launcher)
    return configs


def check_launcher(launcher: DictConfig) -> None:
    """Raise ConfigError for an ``at_once`` that is no number of points."""
    value = launcher.at_once
    if value is None and launcher.name == "slurm":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"launcher.at_once={value} does not work. Expected a whole number of at least 1.")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def raise_flaws(flaws: Mapping[int, str], count: int) -> None:
    """Say everything that is wrong with the points, each reason once.

    Raises:
        ConfigError: there is something.
    """
    if not flaws:
        return
    reasons: dict[str, list[int]] = {}
    for number, reason in flaws.items():
        reasons.setdefault(reason, []).append(number)
    lines = [
        f"  x {'point' if len(numbers) == 1 else 'points'} {_ranges(numbers)}: {reason}"
        for reason, numbers in reasons.items()
    ]
    raise ConfigError(f"{len(flaws)} of {count} points cannot run; nothing was written:\n" + "\n".join(lines))


def _ranges(numbers: Sequence[int]) -> str:
    """``1-3, 7``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def name_points(points: Sequence[Sequence[str]], configs: Sequence[DictConfig], first: int = 1) -> list[Point]:
    """Number the points from ``first`` and name their folders after what varies: ``003_plugin-fork_mask_seed-1``."""
    varying = varying_keys(points)
    out = []
    for number, (overrides, cfg) in enumerate(zip(points, configs, strict=True), first):
        given = {_identity(o): o.partition("=")[2] for o in overrides}
        varies = {short: given[key] for key, short in varying.items() if key in given}
        steps = cfg.trainer.get("max_steps")
        out.append(
            Point(number, folder_name(number, varies), list(overrides), varies, steps if (steps or 0) > 0 else None)
        )
    return out


def varying_keys(points: Sequence[Sequence[str]]) -> dict[str, str]:
    """Key -> the shortest of its endings that no other varying key has: ``plugin.steer.w_min`` is ``w_min``."""
    values: dict[str, set[str]] = {}
    for overrides in points:
        for override in overrides:
            values.setdefault(_identity(override), set()).add(override)
    keys = [key for key, seen in values.items() if len(seen) > 1]

    def ending(key: str, parts: int) -> str:
        return ".".join(key.lstrip("+").split(".")[-parts:])

    short = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        unique = (n for n in lengths if Counter(ending(k, n) for k in keys)[ending(key, n)] == 1)
        short[key] = ending(key, next(unique, len(lengths)))
    return short


def folder_name(number: int, varies: Mapping[str, str]) -> str:
    """``003_plugin-fork_mask+steer_seed-1``: no character that a shell or Hydra reads, at most 100 of them."""
    parts = [f"{number:03d}"]
    for key, value in varies.items():
        word = value.strip("[]'\" ").replace(",", "+") or "none"
        parts.append(f"{key}-{word}")
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts))[:_LONGEST].rstrip("-_.+")
