"""Alarms on silence: a method that touches nothing, a data set that teaches nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping

from rl.dynamics import Histogram


class NoOpAlarm:
    """Warns once when a plug-in touched no token, or no group had reward spread, for ``patience`` logs in a row.

    Args:
        shadows: names of plug-ins that only measure what they would do.
    """

    def __init__(self, shadows: Collection[str] = (), patience: int = 20):
        self.shadows, self.patience = frozenset(shadows), patience
        self._idle: Counter[str] = Counter()

    def __call__(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        silent = {
            n.split("/")[1] for n, v in metrics.items() if n.startswith("plugin/") and n.endswith("/touched") and v == 0
        }
        plugins = {n.split("/")[1] for n in metrics if n.startswith("plugin/")}
        for name in plugins:
            shadow = name in self.shadows
            what = (
                f"plugin.{name}, a shadow, would have touched no token"
                if shadow
                else f"plugin.{name} has touched no token"
            )
            self._count(name, name in silent, what, step, _SHADOW_CAUSES if shadow else _PLUGIN_CAUSES)
        dead = metrics.get("rollout/zero_std_groups") == 1.0
        self._count("zero_std", dead, "no group has had any reward spread", step, _REWARD_CAUSES)

    def state_dict(self) -> dict[str, int]:
        """How long each has been silent."""
        return dict(self._idle)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._idle = Counter(state)

    def _count(self, key: str, silent: bool, what: str, step: int, causes: str) -> None:
        self._idle[key] = self._idle[key] + 1 if silent else 0
        if self._idle[key] == self.patience:
            warnings.warn(f"{what} for {self.patience} steps (now at step {step}). {causes}", stacklevel=2)


_PLUGIN_CAUSES = "It is a silent no-op: its settings may be neutral, all advantages may be zero, or an earlier plug-in keeps no token."
_SHADOW_CAUSES = "Acting it would be a silent no-op: its settings may be neutral, or all advantages may be zero."
_REWARD_CAUSES = (
    "GRPO learns nothing from such groups: the problems may be too hard or too easy, the reward may not parse the "
    "completions (look at the recorded rollouts), or completions may be truncated."
)
