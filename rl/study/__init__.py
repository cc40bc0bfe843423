"""Looks at a model without training it: its tokens, its forks, its passport."""
