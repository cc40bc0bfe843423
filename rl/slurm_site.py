"""The ``slurm`` settings: what sbatch would not take, or would take for something else."""

from __future__ import annotations

import re

from omegaconf import DictConfig, ListConfig

from rl.errors import ConfigError

# What the scripts say themselves.
_OURS = {
    "--nodes": "set engine.nodes",
    "--ntasks": "set engine.processes and engine.nodes",
    "--ntasks-per-node": "set engine.processes",
    "--array": "use entrl sweep",
    "--output": "the log is in the run folder",
    "--error": "the log is in the run folder",
    "--signal": "set slurm.signal_seconds",
}
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for the first ``slurm`` value that sbatch would not take, or would take for something else."""
    node = cfg.slurm
    for key in ("partition", "account", "qos"):
        _expect(key, node[key], lambda v: not re.search(r"\s", str(v)) and str(v) != "", "a name without spaces")
    if isinstance(node.time, int):
        raise ConfigError(
            f"slurm.time={node.time} is a number: without quotes, yaml reads 1:30 as 90. Write '12:00:00', or '90' for minutes."
        )
    _expect("time", node.time, lambda v: _seconds(str(v)) > 0, "'90' minutes, '12:00:00' or '2-00:00:00'")
    _expect("cpus_per_task", node.cpus_per_task, lambda v: _whole(v, 1), "a whole number of at least 1")
    _expect("mem", node.mem, lambda v: re.fullmatch(r"\d+[KMGT]?", str(v)), "200G, or 0 for all of a node")
    gpus = r"([A-Za-z]\w*:)?[1-9]\d*"
    _expect("gpus_per_node", node.gpus_per_node, lambda v: re.fullmatch(gpus, str(v)), "8 or 'a100:8'")
    _expect("signal_seconds", node.signal_seconds, lambda v: _whole(v, 1) and v <= 65535, "1 to 65535 seconds")
    if node.signal_seconds is None:
        raise ConfigError("slurm.signal_seconds is not set. Expected 1 to 65535 seconds; 120 is the default.")
    if node.time is not None and _seconds(node.time) <= node.signal_seconds + 60:
        raise ConfigError(
            f"slurm.time={node.time} leaves no time to train: the run stops up to {node.signal_seconds + 60} s before that. "
            "Give more time, or a smaller slurm.signal_seconds."
        )
    for key in ("modules", "setup", "extra"):
        _expect(key, node[key], _is_lines, "a list of texts, as ['one', 'two']")
    for key in ("container", "python"):
        _expect(key, node[key], lambda v: isinstance(v, str) and v.strip() and "\n" not in v, "one line of text")
    for option in lines(node.extra):
        name = option.split("=")[0].split(" ")[0]
        if not re.match(r"--?[a-z]", option) or "\n" in option:
            raise ConfigError(f"slurm.extra holds {option!r}. Expected options of sbatch, as --constraint=h100.")
        if name in _OURS:
            raise ConfigError(f"slurm.extra holds {name}, which the script has itself: {_OURS[name]}.")
    count = gpus_per_node(cfg)
    if count is not None and _whole(cfg.engine.processes, count + 1):
        raise ConfigError(
            f"engine.processes={cfg.engine.processes} is more than slurm.gpus_per_node={node.gpus_per_node}. "
            "Expected at most one process a GPU."
        )


def _expect(key: str, value: object, fits, expected: str) -> None:
    if value is not None and not fits(value):
        raise ConfigError(f"slurm.{key}={value} does not work. Expected {expected}.")


def _is_lines(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, ListConfig) and all(isinstance(v, str) for v in value))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _seconds(time: str) -> int:
    """Of a time limit as Slurm reads it; 0 for one that it does not."""
    if not (found := _TIME.fullmatch(time)):
        return 0
    days, a, b, c = (int(found[g] or 0) for g in "dabc")
    if found["d"] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    if found["c"] is not None:
        return (a * 60 + b) * 60 + c
    return a * 60 + b


def gpus_per_node(cfg: DictConfig) -> int | None:
    """The number in ``slurm.gpus_per_node``, without its type."""
    asked = cfg.slurm.gpus_per_node
    return None if asked is None else int(str(asked).rpartition(":")[2])


def lines(value: str | ListConfig | None) -> list[str]:
    """A text, or a list of them, as a list."""
    return [str(value)] if isinstance(value, str) else [str(line) for line in value or []]


def directive(value: str) -> str:
    """A value as sbatch reads it from a line of the script."""
    if any(c == "\\" or not c.isprintable() for c in value):
        raise ConfigError(
            f"{value!r} holds a backslash or a line break, which sbatch cannot be told. Choose another name."
        )
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value) else '"' + value.replace('"', '\\"') + '"'
