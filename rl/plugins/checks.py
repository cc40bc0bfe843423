"""What plug-ins share: checks of their arguments, the count that changes a denominator, and a covariance."""

from __future__ import annotations

from torch import Tensor

from rl.contract import Scope, TokenBatch
from rl.errors import ConfigError


def one_of(key: str, value: object, allowed: tuple) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"plugin.{key}={value} is not known. Expected one of {', '.join(map(str, allowed))}.")


def fraction(key: str, value: float, hint: str) -> None:
    """Raise ConfigError unless 0 < value <= 1."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"plugin.{key}={value} is not a fraction. Expected 0 < {key.split('.')[-1]} <= 1; {hint}")


def n_all_over_kept(tokens: TokenBatch, kept: Tensor, scope: Scope) -> Tensor:
    """Trainable tokens over kept tokens, a scalar; 1 where nothing is kept."""
    n_kept = tokens.reduce.sum(kept.float(), scope)
    return (tokens.reduce.count(scope) / n_kept.clamp(min=1.0)).where(n_kept > 0, 1.0)


def covariance(tokens: TokenBatch, advantages: Tensor, scope: Scope) -> Tensor:
    """(B, T) ``(A - mean A) (ln p - mean ln p)`` with means over the tokens of the scope, without gradient."""
    logp = tokens.logp.detach()
    return (advantages - tokens.reduce.mean(advantages, scope)) * (logp - tokens.reduce.mean(logp, scope))
