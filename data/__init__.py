"""Rows in, prompts out. Imports neither torch, nor ``rl``, nor ``rewards``."""
