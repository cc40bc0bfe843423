"""A reward that counts only where another one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rewards.text import Completion


class Once:
    """A reward that several ask for: the values of the last call are kept, for the same list of completions."""

    def __init__(self, fn: Callable[..., list[float]]):
        self.__name__, self.needs_logp, self.fn = fn.__name__, getattr(fn, "needs_logp", False), fn
        self._last: tuple[Sequence[Completion], list[float]] | None = None

    def __call__(self, prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float]:
        # By identity: within one step the trainer hands the very same list to every reward.
        if self._last is None or self._last[0] is not completions:
            self._last = completions, self.fn(prompts=prompts, completions=completions, **columns)
        return list(self._last[1])


class Gated:
    """A reward set to 0.0 for the completions whose gate, another reward, is below ``least``.

    Series: ``reward/<name>/gated``, the share of completions whose gate was closed.
    """

    def __init__(self, fn: Callable[..., list[float]], gate: Callable[..., list[float]], least: float):
        self.__name__, self.fn, self.gate, self.least = fn.__name__, fn, gate, least
        self.needs_logp = any(getattr(f, "needs_logp", False) for f in (fn, gate))

    def __call__(self, prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float]:
        values = self.fn(prompts=prompts, completions=completions, **columns)
        opened = [g >= self.least for g in self.gate(prompts=prompts, completions=completions, **columns)]
        if (log := columns.get("log_metric")) is not None:
            log(f"reward/{self.__name__}/gated", 1 - sum(opened) / len(opened))
        return [value if is_open else 0.0 for value, is_open in zip(values, opened, strict=True)]
