"""The only place that knows Hydra: composing a configuration, saying what is wrong with one, showing what differs."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rl.errors import ConfigError, MissingError
from rl.paths import configs_dir

# groups and keys of no consequence for what is trained: where a run lies, who watches it, which machine has it, how models are looked at
BOOKKEEPING = (
    "run",
    "logger",
    "launcher",
    "slurm",
    "record",
    "checkpoint",
    "resume",
    "dry_run",
    "alarm",
    "forks",
    "passport",
)


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The resolved configuration of ``entrl train`` under Hydra overrides.

    ``trainer.x=`` may name any option of TRL, also one that no yaml lists.

    Args:
        config_dir: a folder with further groups, for private methods: ``my_configs/plugin/my_idea.yaml``.

    Raises:
        ConfigError: an unknown group option or key, settings of a plug-in that is not selected, a missing value.
    """
    keys = {o.partition("=")[0] for o in overrides}
    for group in ("plugin", "reward"):
        if {group, f"+{group}"} <= keys:  # Hydra would drop the second without a word
            raise ConfigError(
                f"{group}= and +{group}= together: Hydra takes only the first. Give one list: '{group}=[a,b]'."
            )
    asked = [word for o in overrides for word in _as_hydra(o)]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(
                f"--config-dir {config_dir} is no folder. Expected one with groups in it, as plugin/my_idea.yaml."
            )
        asked.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        try:
            cfg = hydra_compose("train", overrides=asked)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error, overrides)) from error
        except ValueError as error:  # Hydra's own for a group that is null
            group = next(
                (o for o in overrides if o.endswith("=null") and _options(o[: -len("=null")].lstrip("+"))), None
            )
            if group is None:
                raise
            name = group[: -len("=null")].lstrip("+")
            raise ConfigError(
                f"{group} takes no choice. Expected one of: {', '.join(_options(name))}; or '~{name}'."
            ) from error
    _check_selected(cfg)
    _check_sets(cfg.data)
    try:
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise MissingError(error.full_key) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}.") from error


_OPEN = (
    "trainer.",
    "engine.deepspeed.",
    "data.columns.",
    "data.where.",
    "data.weights.",
)  # maps that take further keys
_SHADOW = re.compile(r"plugin\.\w+\.shadow")  # a key of every plug-in, which no yaml of theirs lists
# Keys that hold whole data sets by name: a list of names stands for their files in configs/data/.
_SETS = ("data.sets", "data.filter.decontaminate", "eval.sets")


def _as_hydra(override: str) -> list[str]:
    """What Hydra is asked for an override: it must be told where further keys are welcome, and what a list of data sets means."""
    key, _, value = override.partition("=")
    if key in _SETS:
        names = [name.strip() for name in value.strip("[]'\" ").split(",") if name.strip()]
        if "mixture" in names:
            raise ConfigError(f"{override}: a mixture cannot be one of several sets. Name the sets that it is made of.")
        return [f"+data@{key}.{name}={name}" for name in dict.fromkeys(names)]
    further = key.startswith(_OPEN) or _SHADOW.fullmatch(key)
    return [f"++{override}" if further and value else override]


def choices(override: str) -> list[str]:
    """The overrides that one of a sweep stands for: ``seed=1,2`` is ``seed=1`` and ``seed=2``; one without choices is itself.

    Raises:
        ConfigError: it cannot be read, or its values cannot be counted (``interval()``, ``glob()``).
    """
    parsed = _parsed(override)
    if not parsed.is_sweep_override():
        return [override]
    try:
        return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(
            f"{override} has no countable choices. Expected a,b,c, choice(a,b,c) or range(1,4); intervals are for a search, "
            "a named sweep with an optuna part."
        ) from error


def override_value(override: str) -> Any:
    """What Hydra reads from the right side of ``key=value``; raises ConfigError where it cannot be read."""
    return _parsed(override).value()


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; ``step`` is None for all between them."""

    low: float
    high: float
    step: float | None
    log: bool


def search_space(override: str) -> Range | list[str]:
    """The values a search may give to a key: ``interval(a,b)``, ``tag(log,interval(a,b))``, ``int(interval(a,b))``, ``range()`` or choices.

    Raises:
        ConfigError: it cannot be read, or an interval has no extent or takes the logarithm of what has none.
    """
    value = _parsed(override).value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        if not value.start < value.end or (log and value.start <= 0):
            raise ConfigError(
                f"{override} is no interval. Expected low < high{', both above 0 for log' if log else ''}."
            )
        return Range(value.start, value.end, None, log)
    if isinstance(value, RangeSweep) and len(values := list(value.range())) > 1:
        return Range(min(values), max(values), abs(value.step), False)
    return [word.partition("=")[2] for word in choices(override)]


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([override])[0]
    except OverrideParseException as error:
        raise ConfigError(_explain(error, [override])) from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = f"{error}\n{error.__cause__}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read as an override: {_first_line(error)}. Expected key=value."
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, option = missing[1].rpartition("/")
        known = _options(group)
        return f"{group}={option} does not exist.{did_you_mean(option, known)} Expected one of: {', '.join(known)}."
    if key := re.search(r"Could not override '([^']+)'", text):
        at = re.search(r"full_key: (\S+)", text)
        return _unknown_key(key[1], at[1] if at else key[1])
    if "Multiple values for" in text and "plugin" in text:
        return "Several plugin= choices on one line. Give one list: 'plugin=[a,b]', or '+plugin=[a,b]' to add to an experiment's."
    named = next((o for o in overrides if o.split("=")[0].lstrip("+~") in text), None)
    return f"{_first_line(error)}{f' (from {named})' if named else ''}."


def _options(group: str) -> list[str]:
    root = configs_dir() / group
    # a leading underscore: what other files build on
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml") if p.name[0] != "_")


def _unknown_key(key: str, missing_at: str) -> str:
    """``missing_at`` is where the path breaks off: ``plugin.steer`` for ``plugin.steer.w_min`` when steer is not selected."""
    group, _, name = missing_at.partition(".")
    if group == "plugin" and "." not in name and name != key:
        if name in plugin_names():
            return f"{key} is set, but the plug-in {name} is not selected. Select it, plugin=[fork_mask,{name}], or drop the setting."
        return f"plugin.{name} does not exist.{did_you_mean(name, plugin_names())} Known: {', '.join(plugin_names())}."
    selected = [f"plugin=[{key.split('.')[1]}]"] if group == "plugin" else []
    known = list(_keys(compose(selected)))
    return f"{key} is not a key of the configuration.{did_you_mean(key, known)} See all: entrl show --full."


def _check_selected(cfg: DictConfig) -> None:
    """Settings without the plug-in they belong to, the traps Hydra does not see."""
    for name, node in cfg.plugin.items():
        if node is None:
            raise ConfigError(
                f"plugin.{name}=null does not take a plug-in away. Name the ones you want, plugin=[...], or use '~plugin.{name}'."
            )
        if "_target_" not in node:
            raise ConfigError(
                f"plugin.{name} has settings ({', '.join(map(str, node))}) but is not selected, so they would do nothing. "
                f"Select it, plugin=[{name}], or drop the settings with '~plugin.{name}'."
            )
    for name, node in cfg.reward.items():
        if node is None or "fn" not in node:
            raise ConfigError(
                f"reward.{name} has settings but is not selected. Select it, reward=[{name}], or use '~reward.{name}'."
            )


def _check_sets(data: DictConfig) -> None:
    if "sets" in data and "mixture" not in str(data.train.get("_target_")):
        raise ConfigError(
            f"data.sets is for data=mixture, not data={data.name}. Add data=mixture, or evaluate on several: eval.sets=."
        )


def reward_gates(reward: DictConfig) -> dict[str, tuple[str | None, float]]:
    """The gate of each selected reward, None where it has none, and the least value of the gate that lets it count.

    Raises:
        ConfigError: a gate that is not selected, the reward itself or part of a circle; a number that is none; an unknown key.
    """
    gates = {}
    for name, node in reward.items():
        key = f"reward.{name}"
        if name in _SERIES_OF_ALL:
            raise ConfigError(
                f"{key}: the series {key.replace('.', '/')} means all rewards together. Choose another name."
            )
        if unknown := [k for k in node if k not in _REWARD_KEYS]:
            raise ConfigError(
                f"{key}.{unknown[0]} is not a key of a reward.{did_you_mean(unknown[0], _REWARD_KEYS)} "
                f"Expected: {', '.join(_REWARD_KEYS)}; what the function takes stands under fn."
            )
        gate, least = node.get("gate"), node.get("gate_min", 0.5)
        for option, value in (("weight", node.get("weight")), ("gate_min", least)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{key}.{option}={value} does not work. Expected a number.")
        others = [other for other in reward if other != name]
        if gate is not None and gate not in others:
            why = "is the reward itself" if gate == name else "is not selected"
            known = (
                f"one of: {', '.join(others)}" if others else "another selected reward, as reward=[correct,format_tags]"
            )
            raise ConfigError(f"{key}.gate={gate} {why}. Expected {known}, or null.")
        gates[name] = (gate, float(least))
    return gates


_REWARD_KEYS = ("weight", "gate", "gate_min", "fn")
_SERIES_OF_ALL = ("mean", "std")


def gate_order(gates: Mapping[str, tuple[str | None, float]]) -> list[str]:
    """The rewards in an order in which each comes after its gate.

    Raises:
        ConfigError: gates that wait for each other.
    """
    order: list[str] = []
    while len(order) < len(gates):
        ready = [name for name, (gate, _) in gates.items() if name not in order and (gate is None or gate in order)]
        if not ready:
            circle = [name for name in gates if name not in order]
            raise ConfigError(
                f"reward.{circle[0]}.gate={gates[circle[0]][0]} goes in a circle: {', '.join(circle)} wait for each other. "
                f"Set the gate of one of them to null."
            )
        order += ready
    return order


def _keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict | DictConfig):
            yield from _keys(value, f"{prefix}{key}.")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def plugin_names() -> list[str]:
    """The plug-ins that ship with entrl."""
    return _options("plugin")


def differences(cfg: DictConfig, base: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Leaf key -> (value in base, value in cfg) where they differ; a missing one is None."""
    a, b = leaves(base), leaves(cfg)
    return {key: (a.get(key), b.get(key)) for key in [*b, *(k for k in a if k not in b)] if a.get(key) != b.get(key)}


def leaves(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their dotted keys; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict | DictConfig) and value:
            out |= leaves(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return out
