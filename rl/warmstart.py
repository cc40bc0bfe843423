"""The supervised warm start, with the generalised next-token objective of "Diversity or Precision?"."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Example = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids (its end-of-text token included)


def next_token_loss(
    logits: Tensor, labels: Tensor, beta: float = 0.0, lam_head: float = 0.0, lam_tail: float = 0.0, k: int = 100
) -> Tensor:
    """Mean over labelled positions of the loss whose expected gradient is one-step RL on the next token.

    ``L = -[ sg((1 - p_x)^beta) ln p_x + lam_head P_head + lam_tail P_tail ]`` with P_head the probability of the top k
    tokens other than the label x, P_tail that of the rest; which tokens are in the top k carries no gradient. beta = lam = 0
    is cross-entropy. Source: arXiv 2512.22955, equations 11 to 13, in closed form (no sampling).

    Args:
        logits: (..., V) float32 or float64. labels: (...) token ids, -100 is ignored.
        beta: > -1; lam_head: the paper's lambda-tilde; lam_tail: its lambda-hat; k: size of the head.
    """
    valid = labels != -100
    logp = logits[valid].log_softmax(-1)
    x = labels[valid][:, None]
    logp_x = logp.gather(-1, x).squeeze(-1)
    weight = (1 - logp_x.detach().exp()).clamp(min=1e-6) ** beta if beta else 1.0
    gain = weight * logp_x
    if lam_head or lam_tail:
        p = logp.exp()
        top = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, logp.topk(min(k, p.shape[-1]), -1).indices, True)
        other = torch.ones_like(top).scatter_(-1, x, False)
        gain = gain + lam_head * (p * (top & other)).sum(-1) + lam_tail * (p * (~top & other)).sum(-1)
    return -gain.sum() / valid.sum().clamp(min=1)


class Progress(NamedTuple):
    """Where a warm start is: ``loss`` is the mean over the steps since the last report."""

    step: int
    steps: int
    loss: float


def warm_start(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 4e-3,
    warmup_steps: int = 50,
    weight_decay: float = 0.01,
    seed: int = 0,
    beta: float = 0.0,
    lam_head: float = 0.0,
    lam_tail: float = 0.0,
    k: int = 100,
    report: Callable[[Progress], None] | None = None,
    report_every: int = 100,
) -> list[float]:
    """Train ``model`` in place on the completions of ``examples``; the loss of every step is returned.

    AdamW with linear warm-up and cosine to 2 %, gradients clipped at norm 1. Deterministic for a seed and a step count.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    model.train()
    losses: list[float] = []
    for step, batch in zip(range(steps), batches(examples, batch_size, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps, warmup_steps)
        ids, labels = collate(batch)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = next_token_loss(logits[:, :-1].float(), labels[:, 1:], beta, lam_head, lam_tail, k)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if report is not None and (step + 1) % report_every == 0:
            report(Progress(step + 1, steps, sum(losses[-report_every:]) / report_every))
    model.eval()
    return losses


def _schedule(step: int, steps: int, warmup_steps: int) -> float:
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    return min(1.0, (step + 1) / warmup_steps) * (0.98 * cosine + 0.02)


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches of examples of similar length, so that little is padding."""
    rng = random.Random(seed)
    window = 8 * batch_size
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        starts = []
        for i in range(0, len(order), window):
            chunk = sorted(order[i : i + window], key=lambda j: len(examples[j][0]) + len(examples[j][1]))
            starts += [chunk[j : j + batch_size] for j in range(0, len(chunk), batch_size)]
        rng.shuffle(starts)
        for batch in starts:
            yield [examples[j] for j in batch]


def collate(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, (B, T); prompt and padding are labelled -100. Needs no attention mask: padding is last."""
    width = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, (prompt, completion) in enumerate(batch):
        whole = torch.tensor([*prompt, *completion])
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels
