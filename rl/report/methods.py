"""Which runs are the same method: those whose configurations differ in the seed, in names and in places only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.config import BOOKKEEPING, leaves
from rl.report.reading import Run
from rl.shadows import acting_plugins

_PARTS = ("plugin", "reward")  # groups of named parts: a part's settings differ only between runs that have it
ABSENT = "-"


@dataclass(frozen=True)
class Method:
    """Runs that differ in the seed only.

    Attributes:
        label: the settings that tell it from the other methods. settings: all keys that differ between methods, with its values.
    """

    label: str
    settings: Mapping[str, str]
    runs: Sequence[Run]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config["seed"] for run in self.runs if "seed" in run.config})


def group(runs: Sequence[Run]) -> list[Method]:
    """The methods, in the order in which their first run comes; runs by seed, then by name."""
    flat = [settings(run.config) for run in runs]
    follow = _seed_keys(runs, flat)
    found: dict[tuple, list[int]] = {}
    for i, config in enumerate(flat):
        found.setdefault(tuple(sorted((k, v) for k, v in config.items() if k not in follow)), []).append(i)
    configs = [{k: v for k, v in flat[members[0]].items() if k not in follow} for members in found.values()]
    keys = _differing(configs)
    labels = _labels(configs, keys)
    return [
        Method(
            label=label,
            settings={key: config.get(key, ABSENT) for key in keys},
            runs=sorted((runs[i] for i in members), key=lambda run: (run.config.get("seed", 0), run.name)),
        )
        for label, config, members in zip(labels, configs, found.values(), strict=True)
    ]


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What is trained, as dotted keys and short words; ``plugin`` and ``reward`` are the names in their order."""
    config = trained(config)
    out = {part: "+".join(config.get(part) or {}) or "none" for part in _PARTS}
    for key, value in leaves(config).items():
        if key not in _PARTS:
            out[key] = _word(value)
    return out


def trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what changes nothing that is trained: bookkeeping, and plug-ins that only watch."""
    kept = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    if isinstance(config.get("plugin"), Mapping):
        kept["plugin"] = {name: _without_shadow(config["plugin"][name]) for name in acting_plugins(config)}
    return kept


def _without_shadow(node: Any) -> Any:
    return {key: value for key, value in node.items() if key != "shadow"} if isinstance(node, Mapping) else node


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _seed_keys(runs: Sequence[Run], flat: Sequence[Mapping[str, str]]) -> set[str]:
    """Keys called seed that are the run's seed in every run that has them: ``seed`` itself, ``trainer.seed``, ``data.train.seed``."""
    keys = {key for config in flat for key in config if key.split(".")[-1] == "seed"}
    return {
        key
        for key in keys
        if all(key not in c or c[key] == _word(run.config.get("seed")) for run, c in zip(runs, flat, strict=True))
    }


def _differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    keys = list(dict.fromkeys(key for config in configs for key in config))

    def differs(key: str) -> bool:
        part = key.split(".")[0] in _PARTS and key not in _PARTS
        return len({config.get(key) for config in configs if not part or _has(config, key)}) > 1

    return [key for key in keys if differs(key)]


def _has(config: Mapping[str, str], key: str) -> bool:
    part, name = key.split(".")[:2]
    return name in config[part].split("+")


def _labels(configs: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """``key=value`` of what differs; of a data set or model that differs the name alone, where that tells the methods apart."""
    if not keys:
        return [f"plugin={config['plugin']}" for config in configs]
    named = {group for group in ("data", "model") if f"{group}.name" in keys}
    short = [key for key in keys if key.endswith(".name") or key.split(".")[0] not in named]
    for chosen in (short, keys):
        labels = [
            " ".join(f"{key.removesuffix('.name')}={config[key]}" for key in chosen if key in config)
            for config in configs
        ]
        if len(set(labels)) == len(labels):
            break
    return labels
