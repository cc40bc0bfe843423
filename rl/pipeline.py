"""Runs plug-ins in order and audits each: a method that touches no token is an alarm, not a silent no-op.

Shadows run beside them and change nothing: what each would do to plain GRPO is measured, compared and thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rl.contract import NEEDS, PROMISES, Cosine, Mean, Penalty, Rollout, RunFacts, Signal, TokenBatch, TokenPlugin
from rl.errors import ConfigError

_GRADIENT = frozenset({"logp.grad", "entropy.grad", "zero_advantage", "logit_scale"})


class Pipeline:
    """Plug-ins by name, run in the order given.

    Args:
        plugins: name -> plug-in; the name prefixes its metrics and penalties.
        shadows: name -> plug-in that sees plain GRPO's signal and changes nothing; of what it needs it gets the values, without
            gradient. A name is in one of the two.

    Raises:
        ConfigError: a plug-in needs something no batch has, or promises something nobody asks for.
    """

    def __init__(self, plugins: Mapping[str, TokenPlugin], shadows: Mapping[str, TokenPlugin] | None = None):
        self.plugins, self.shadows = dict(plugins), dict(shadows or {})
        for name, plugin in self._all.items():
            if unknown := set(plugin.needs) - NEEDS:
                raise ConfigError(f"plugin.{name} needs {sorted(unknown)}. Known needs: {sorted(NEEDS)}.")
            if unknown := _promises(plugin) - PROMISES:
                raise ConfigError(f"plugin.{name} promises {sorted(unknown)}. Known promises: {sorted(PROMISES)}.")
        acting = frozenset().union(*(p.needs for p in self.plugins.values()))
        self.needs = acting.union(*(p.needs - _GRADIENT for p in self.shadows.values()))
        self.promises = PROMISES.intersection(*map(_promises, self._all.values()))

    @property
    def _all(self) -> dict[str, TokenPlugin]:
        return self.plugins | self.shadows

    def __call__(self, tokens: TokenBatch) -> Signal:
        """The signal after all plug-ins, each one's metrics under ``plugin/<name>/``, and the overlap of shadows with it."""
        start = signal = Signal.start(tokens)
        for name, plugin in self.plugins.items():
            after = plugin(_with_notes(name, tokens), replace(signal, metrics={}))
            signal = _named(name, tokens, signal, after)
        overlaps = {}
        for name, plugin in self.shadows.items():
            would = self._as_shadow(name, plugin, tokens, start)
            overlaps |= would.metrics | _overlap(name, tokens, start, would, signal, acts=bool(self.plugins))
        return replace(signal, metrics={**signal.metrics, **overlaps})

    @staticmethod
    @torch.no_grad()
    def _as_shadow(name: str, plugin: TokenPlugin, tokens: TokenBatch, start: Signal) -> Signal:
        with _own_random_numbers(tokens.logp):
            return _named(name, tokens, start, plugin(_with_notes(name, tokens), start))

    @torch.no_grad()
    def at_rollout(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the plug-ins note of each completion, as ``plugin/<name>/<key>``: (N,), to travel with it to ``tokens.noted``.

        Raises:
            ConfigError: a note that is not one number a completion.
        """
        notes: dict[str, Tensor] = {}
        for name, plugin in self._all.items():
            if hasattr(plugin, "at_rollout"):
                with _own_random_numbers(rollout.mask) if name in self.shadows else nullcontext():
                    found = plugin.at_rollout(rollout)
                for key, value in found.items():
                    if value.shape != rollout.reward.shape:
                        raise ConfigError(
                            f"plugin.{name}: at_rollout noted {key} of shape {tuple(value.shape)}. Expected one number a completion "
                            f"of this rank, {tuple(rollout.reward.shape)}; rollout.own(...) makes that of one a group and member."
                        )
                    notes[f"{_notes(name)}{key}"] = value
        return notes

    def check_gradients(self, signal: Signal, alive: Tensor | None = None) -> None:
        """Refuse a signal some of whose gradient would be lost, because a plug-in does not say what it needs.

        Args:
            alive: broadcastable to (B, T), False for completions that got no forward with gradient; None if all did.

        Raises:
            ConfigError: says what to add to the needs.
        """
        for penalty in signal.penalties:
            if penalty.coef and not penalty.per_token.requires_grad:
                raise ConfigError(
                    f"plugin.{penalty.name} penalises something that carries no gradient. Add what it is made of to the "
                    'needs of the plug-in: "logp.grad", "entropy.grad" or "full_kl".'
                )
        if signal.logit_scale is not None and "logit_scale" not in self.needs:
            raise ConfigError(
                f'plugin={list(self.plugins)}: one of them scales logits, which would change nothing. Add "logit_scale" to its needs.'
            )
        if alive is not None and self.plugins and bool(((signal.effective != 0) & ~alive).any()):
            raise ConfigError(
                f"plugin={list(self.plugins)}: one of them gives gradient to completions whose advantage is 0, which the "
                'trainer leaves out. Add "zero_advantage" to its needs.'
            )

    def asking(self, need: str) -> str:
        """``plugin.<name>`` of the first that needs something."""
        return next(f"plugin.{name}" for name, plugin in self._all.items() if need in plugin.needs)

    def check(self, run: RunFacts) -> list[str]:
        """Advice of the plug-ins about this run, one sentence each."""
        return [
            f"plugin.{name}{' (a shadow)' if name in self.shadows else ''}: {advice}"
            for name, plugin in self._all.items()
            if hasattr(plugin, "check")
            for advice in plugin.check(run)
        ]

    def state_dict(self) -> dict[str, Any]:
        """State of the plug-ins that have some."""
        return {name: p.state_dict() for name, p in self._all.items() if hasattr(p, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; plug-ins without state are left alone, and a shadow may be gone."""
        for name in state.keys() & self._all.keys():
            self._all[name].load_state_dict(state[name])


def _promises(plugin: TokenPlugin) -> frozenset[str]:
    return frozenset(getattr(plugin, "promises", ()))


def _own_random_numbers(near: Tensor) -> AbstractContextManager:
    """For a shadow: one that draws random numbers would change the next rollout."""
    return torch.random.fork_rng([near.device] if near.is_cuda else [])


def _notes(name: str) -> str:
    return f"plugin/{name}/"


def _with_notes(name: str, tokens: TokenBatch) -> TokenBatch:
    """The batch with this plug-in's own notes, under the names it gave them."""
    prefix = _notes(name)
    own = {key.removeprefix(prefix): value for key, value in tokens.noted.items() if key.startswith(prefix)}
    return replace(tokens, noted=own) if tokens.noted else tokens


def _named(name: str, tokens: TokenBatch, before: Signal, after: Signal) -> Signal:
    added = after.penalties[len(before.penalties) :]
    penalties = before.penalties + tuple(replace(p, name=f"{name}/{p.name}") for p in added)
    metrics = {**after.metrics, **_audit(tokens, before, after, added)}
    named = {f"plugin/{name}/{key}": value for key, value in metrics.items()}
    return replace(after, penalties=penalties, metrics={**before.metrics, **named})


def _audit(tokens: TokenBatch, before: Signal, after: Signal, added) -> dict[str, Mean]:
    """``touched``: share of trainable tokens whose mask, weight, advantage, logits or penalty the plug-in changed.
    ``adv_mass``: sum |effective advantage| after / before."""
    mass = torch.stack([s.effective.abs().mul(tokens.mask).sum() for s in (after, before)])
    changed = _changed(before, after, added)
    return {"touched": Mean.of(changed.float(), tokens.mask), "adv_mass": Mean(mass[0], mass[1])}


def _changed(before: Signal, after: Signal, added: Sequence[Penalty]) -> Tensor:
    """(B, T) whether the policy loss of a token or a penalty on it is another one."""
    changed = (after.keep != before.keep) | (after.weight != before.weight) | (after.advantages != before.advantages)
    for scale, other in ((after.logit_scale, before.logit_scale), (before.logit_scale, after.logit_scale)):
        if scale is not None:
            changed = changed | (scale != (1.0 if other is None else other))
    for penalty in added:
        changed = changed | (penalty.where & (penalty.per_token.detach() * penalty.coef != 0))
    return changed


def _overlap(
    name: str, tokens: TokenBatch, start: Signal, would: Signal, signal: Signal, acts: bool
) -> dict[str, Mean | Cosine]:
    """``jaccard``: tokens that both the shadow and the acting pipeline touch / that either does, where one ``acts``.
    ``cosine``: of their effective advantages over the trainable tokens, penalties left out."""
    found = {f"shadow/{name}/cosine": Cosine.of(would.effective, signal.effective, tokens.mask)}
    if acts:
        a, b = (_changed(start, s, s.penalties) & tokens.mask for s in (would, signal))
        found[f"shadow/{name}/jaccard"] = Mean((a & b).sum(), (a | b).sum())
    return found
