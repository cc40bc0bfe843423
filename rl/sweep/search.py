"""A search: points that Optuna proposes one after the other from what earlier ones came to, kept in ``optuna.journal``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from rl import rundir
from rl.config import Range, compose, did_you_mean, search_space
from rl.errors import ConfigError
from rl.sweep.folder import read_points, write_points
from rl.sweep.points import Point, folder_name, override_key, raise_flaws, varying_keys
from rl.sweep.read import summary_value


class Settings(NamedTuple):
    """The ``optuna:`` part of a named sweep; ``metric`` is a number of summary.json, its keys joined by dots."""

    metric: str
    direction: str
    trials: int
    seed: int


def settings(given: Mapping[str, Any], trials: int | None = None) -> Settings:
    """Read the part; ``trials`` replaces its number.

    Raises:
        ConfigError: an unknown or missing key, a value that does not work.
    """
    node = {"direction": "maximize", "seed": 0, **(given if isinstance(given, Mapping) else {})}
    if trials is not None:
        node["trials"] = trials
    for key in node:
        if key not in Settings._fields:
            raise ConfigError(
                f"optuna.{key} is not known.{did_you_mean(key, Settings._fields)} Expected {', '.join(Settings._fields)}."
            )
    if missing := [key for key in Settings._fields if key not in node]:
        raise ConfigError(f"optuna.{missing[0]} is not set. A search needs metric, as eval.after.pass@1, and trials.")
    if node["direction"] not in ("maximize", "minimize"):
        raise ConfigError(f"optuna.direction={node['direction']} is not known. Expected maximize or minimize.")
    for key, least in (("trials", 1), ("seed", 0)):
        if not isinstance(node[key], int) or isinstance(node[key], bool) or node[key] < least:
            raise ConfigError(f"optuna.{key}={node[key]} does not work. Expected a whole number of at least {least}.")
    return Settings(str(node["metric"]), node["direction"], node["trials"], node["seed"])


def corners(overrides: Sequence[str], config_dir: str | None) -> list[DictConfig]:
    """The configurations at both ends of every range and at every choice, the other keys at their first value.

    Raises:
        ConfigError: nothing to search, or a corner that does not compose.
    """
    ends = {o: _ends(o, search_space(o)) for o in overrides}
    if all(len(words) == 1 for words in ends.values()):
        raise ConfigError("there is nothing to search: no override has an interval, a range or several choices.")
    first = {o: words[0] for o, words in ends.items()}
    points = [list(first.values())]
    points += [list({**first, o: word}.values()) for o, words in ends.items() for word in words[1:]]
    configs, flaws = [], {}
    for number, words in enumerate(points, 1):
        try:
            configs.append(compose(words, config_dir))
        except ConfigError as error:
            flaws[number] = f"{error} ({' '.join(words)})"
    raise_flaws(flaws, len(points))
    return configs


def _ends(override: str, space: Range | list[str]) -> list[str]:
    prefix = override.partition("=")[0]
    values = [space.low, space.high] if isinstance(space, Range) else space
    return [f"{prefix}={value}" for value in values]


class Search:
    """The study of a sweep folder.

    Args:
        overrides: of all points; those with several values are what is searched.
        make: writes the run folder of a proposed point.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], asked: Settings, make: Callable[[Point], DictConfig]):
        optuna = optuna_or_error()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.asked, self._make, self._overrides = folder, asked, make, overrides
        self._spaces = {o: search_space(o) for o in overrides}
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
        self.study = optuna.create_study(
            study_name=folder.name,
            storage=optuna.storages.JournalStorage(backend),
            direction=asked.direction,
            load_if_exists=True,
        )
        # a sampler that begins again with its seed would propose the first points again
        self.study.sampler = optuna.samplers.TPESampler(seed=asked.seed + len(self.study.trials), constant_liar=True)

    def points(self, again: Sequence[Point] = ()) -> Iterator[Point]:
        """Those to run ``again``, then new ones until there are as many as asked for. Each is written when it is taken."""
        for point in read_points(self.folder):  # one that ended while nobody was there to see it
            if rundir.state(self.folder / point.folder) == "done" and not self._trial(point).state.is_finished():
                self.ended(point)
        yield from again
        while len(known := read_points(self.folder)) + self._refused() < self.asked.trials:
            trial = self.study.ask()
            point = self._point(len(known) + 1, self._values(trial))
            try:
                cfg = self._make(point)
            except ConfigError as error:  # the corners fit, and this between them does not
                print(f"refused    {' '.join(point.overrides)}: {error}")
                self.study.tell(trial, state=optuna_or_error().trial.TrialState.FAIL)
                continue
            trial.set_user_attr("point", point.number)
            steps = cfg.trainer.get("max_steps") or 0
            point = point._replace(steps=steps if steps > 0 else None)
            write_points(self.folder, [*known, point])
            yield point

    def _refused(self) -> int:
        return sum("point" not in trial.user_attrs for trial in self.study.trials)

    def _values(self, trial) -> dict[str, str]:
        """Override -> the value proposed for it, of those that are searched."""
        out = {}
        for override, space in self._spaces.items():
            key = override_key(override)
            if isinstance(space, Range):
                suggest = trial.suggest_int if isinstance(space.low, int) else trial.suggest_float
                step = {} if space.step is None else {"step": space.step}
                out[override] = str(suggest(key, space.low, space.high, log=space.log, **step))
            elif len(space) > 1:
                out[override] = trial.suggest_categorical(key, space)
        return out

    def _point(self, number: int, values: Mapping[str, str]) -> Point:
        words = [f"{o.partition('=')[0]}={values[o]}" if o in values else o for o in self._overrides]
        short = varying_keys([[f"{o.partition('=')[0]}={n}" for o in values] for n in (0, 1)])
        varies = {short[override_key(o)]: _short(value) for o, value in values.items()}
        return Point(number, folder_name(number, varies), words, varies, None)

    def _trial(self, point: Point):
        return next(t for t in reversed(self.study.trials) if t.user_attrs.get("point") == point.number)

    def ended(self, point: Point) -> None:
        """Tell the study what a point came to; one that was stopped or lost stays open for a retry.

        Raises:
            ConfigError: the point is done and its summary has no such metric.
        """
        state = rundir.state(self.folder / point.folder)
        if state not in ("done", "failed"):
            return
        optuna = optuna_or_error()
        value = summary_value(self.folder / point.folder, self.asked.metric) if state == "done" else None
        if state == "done" and value is None:
            raise ConfigError(
                f"optuna.metric={self.asked.metric} is not in {self.folder / point.folder / 'summary.json'}. "
                "Expected the keys of a number in it joined by dots, as eval.after.pass@1."
            )
        good = value is not None and math.isfinite(value)
        mine = self._trial(point)
        result = optuna.trial.TrialState.COMPLETE if good else optuna.trial.TrialState.FAIL
        if not mine.state.is_finished():
            self.study.tell(mine.number, value if good else None, state=result)
        elif good:  # it failed, and was run again
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=mine.params, distributions=mine.distributions, value=value, user_attrs=mine.user_attrs
                )
            )

    def best(self) -> tuple[int, float] | None:
        """Number of the best point and its value; None when no point is done."""
        done = self.study.get_trials(states=[optuna_or_error().trial.TrialState.COMPLETE])
        if not done:
            return None
        best = self.study.best_trial
        return best.user_attrs["point"], best.value


def _short(value: str) -> str:
    try:
        return value if value.lstrip("-").isdigit() else f"{float(value):.3g}"
    except ValueError:
        return value


def optuna_or_error():
    """The module; raises ConfigError when it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            'a search needs Optuna, which is not installed. Install it: pip install "entrl[optuna]".'
        ) from error
    return optuna
