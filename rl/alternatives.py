"""What else a token could have been: the most likely words at each place, with their probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl.tiles import LogitRule, Tiles, spans

_LOGITS = 1 << 24  # of one tile: 64 MiB


class Alternatives(NamedTuple):
    """The k most likely words of each place, most likely first. ids: (..., k). logp: (..., k), nats, at the temperature."""

    ids: Tensor
    logp: Tensor


@torch.no_grad()
def alternatives(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule, k: int) -> Alternatives:
    """The words an LM head finds most likely, of equally likely ones the lowest ids not necessarily first.

    Args:
        hidden: (N, D). weight: (V, D). bias: (V,) or None. k: at most V are given.
    """
    size, k = max(1, _LOGITS // len(weight)), min(k, len(weight))
    tiles = Tiles(hidden, rule, size, len(weight))
    parts = [
        Alternatives(
            torch.empty(0, k, dtype=torch.long, device=hidden.device), hidden.new_empty((0, k), dtype=tiles.dtype)
        )
    ]
    _, _, w, b = next(tiles.slabs(weight, bias, len(weight)))
    for start, end in spans(len(hidden), size):
        y = tiles.buffer("y", (end - start, len(weight)))
        tiles.logits(slice(start, end), w, b, y)
        top, ids = y.topk(k)
        ln2 = torch.log(torch.tensor(2.0, dtype=y.dtype))
        parts.append(Alternatives(ids, ln2 * top - (y * ln2).logsumexp(-1, keepdim=True)))
    return Alternatives(*(torch.cat(p) for p in zip(*parts, strict=True)))
