"""Which items of memory are held together: the moments of a step, of which the largest is the peak (rl.memory)."""

from __future__ import annotations

_ALWAYS = ("framework", "weights", "adapters", "reference weights", "optimizer state", "rollout buffer", "vLLM")
_PHASES = {
    "rollout": ("KV cache", "sampling", "gathered weights", "a dequantised layer"),
    "forward/backward": (
        "activations",
        "loss",
        "accumulated gradients",
        "DDP buckets",
        "live weights",
        "a dequantised layer",
    ),
    "reduction": ("gradients", "live weights", "reduce buckets", "reduce copies"),
    "update": ("gradients", "DDP buckets", "fp32 gradients"),
}


def phases(zero_stage: int, device: str) -> dict[str, tuple[str, ...]]:
    """Names of the items held in each moment; "reduction" is DeepSpeed's, when the backward ends."""
    found = {phase: (*_ALWAYS, *names) for phase, names in _PHASES.items() if zero_stage or phase != "reduction"}
    if zero_stage and device == "cuda":  # large models fill a bucket before the backward ends
        found["forward/backward"] += ("reduce buckets", "reduce copies")
    if zero_stage == 3:  # made once and kept
        found = {phase: tuple({*names, "gradients", "reduce buckets"}) for phase, names in found.items()}
    return found
