"""Sweeps: many runs from one command line, each an ordinary run folder."""
