"""Text in, float out. Imports neither torch, nor ``rl``, nor ``data``."""
