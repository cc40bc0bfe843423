"""How uncertain the policy is right after a token, which one token's entropy does not tell."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_ahead(values: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mean of each trainable token's next ``width`` trainable tokens, (B, T), and where so many follow, bool.

    ``W_t = 1/width sum_{j=1..width} values_{t+j}``; 0 elsewhere. Tokens outside ``mask``, such as a tool's, are stepped over.
    Source: window entropy of ARES (arXiv 2510.08457), official code.
    """
    values = values.detach() if values.dtype == torch.float64 else values.detach().float()
    columns = values.shape[1]
    order = (~mask).byte().argsort(dim=-1, stable=True)  # trainable tokens to the front
    packed = values.masked_fill(~mask, 0.0).gather(-1, order)
    full = torch.arange(columns, device=mask.device) + width < mask.sum(-1, keepdim=True)
    mean = torch.zeros_like(packed)
    if columns > width:  # else nothing is full, and there is no window to unfold
        mean[:, : columns - width] = packed[:, 1:].unfold(-1, width, 1).mean(-1)
    mean = mean.where(full, 0.0)
    return torch.zeros_like(mean).scatter(-1, order, mean), torch.zeros_like(full).scatter(-1, order, full)
