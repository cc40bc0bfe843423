"""Which plug-ins of a configuration act and which only watch (docs/explain.md), composed or read from a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shadow_plugins(cfg: Mapping[str, Any]) -> list[str]:
    """The selected plug-ins that only measure what they would do; of a configuration read from a run folder too."""
    nodes = cfg.get("plugin")
    nodes = nodes if isinstance(nodes, Mapping) else {}  # a configuration that was edited by hand
    return [name for name, node in nodes.items() if isinstance(node, Mapping) and node.get("shadow", False)]


def acting_plugins(cfg: Mapping[str, Any]) -> list[str]:
    """The selected plug-ins that act, in order."""
    shadows = shadow_plugins(cfg)
    return [name for name in cfg.get("plugin") or {} if name not in shadows]
