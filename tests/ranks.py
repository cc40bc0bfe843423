"""``two_ranks(fn, *args)`` runs a function in two gloo processes."""

from rl.testing import two_ranks

__all__ = ["two_ranks"]
