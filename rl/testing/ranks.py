"""Two ranks without a GPU, and the law that they do what one process does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor

from rl.contract import TokenBatch
from rl.pipeline import Pipeline
from rl.reduce import join, leave
from rl.testing.laws import close
from rl.testing.samples import Make, of_tokens, random_batch, rows_of, tensors_of, through


def two_ranks(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``fn(rank, *args)`` returns on each of two processes joined over gloo: tensors, numbers, texts, lists, dictionaries.

    The processes are forks of this one, so that ``fn`` and ``args`` may be anything; what one raises is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (fn, folder, args), nprocs=2, start_method="fork")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank: int, fn: Callable[..., Any], folder: str, args: Sequence[Any]) -> None:
    torch.set_num_threads(1)  # threads of the parent did not come along
    join(rank, 2, Path(folder) / "meeting")
    torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
    leave()


class Outcome(NamedTuple):
    """What a plug-in made of a batch: what it made of each token, each penalty's mean, each series as sum and count."""

    tokens: Tensor  # as of_tokens has it
    penalties: list[Tensor]
    series: dict[str, Tensor]


_EMPTY = {"no rank is empty": None, "the first rank is empty": 0, "the second rank is empty": 1}


def two_ranks_are_one_process(make: Make) -> None:
    """Each of two ranks gives its half of the batch what one process gives it, also where a rank has no token.

    A statistic over ``micro`` is one rank's own by definition: a plug-in whose ``explain().statistics`` has one is not tested.
    """
    plugin = make()
    if hasattr(plugin, "explain") and "micro" in plugin.explain().statistics.values():
        return
    check_ranks(make, *on_two_ranks([make])[0])


def on_two_ranks(makes: Sequence[Make]) -> list[tuple[dict, dict]]:
    """What each plug-in does on the first and on the second rank, for ``check_ranks``: one pair of processes for them all."""
    first, second = two_ranks(_on_rank, makes)
    return list(zip(first, second, strict=True))


def check_ranks(make: Make, first: dict, second: dict) -> None:
    """Compare what ``on_two_ranks`` found of a plug-in with one process."""
    for case, empty in _EMPTY.items():
        tokens = _whole(empty)
        one, ranks = _outcome(make, tokens), [Outcome(*found[case]) for found in (first, second)]
        sentence = f"two ranks are not one process, where {case}: "
        for rank, own in enumerate(ranks):
            rows = slice(3 * rank, 3 * rank + 3)
            width = own.tokens.shape[1]
            inside = tokens.mask[rows, :width]
            expected = one.tokens[rows, :width][inside]
            hint = 'the loss of a token differs. Use scope="world", or say "micro" in explain().statistics.'
            close(own.tokens[inside], expected, sentence + hint)
        for i, mean in enumerate(one.penalties):
            both = sum(own.penalties[i] for own in ranks) / 2  # as gradients are averaged
            close(both, mean, sentence + f"penalty {i} differs.")
        for name, value in one.series.items():
            both = sum(own.series[name] for own in ranks)
            close(both, value, sentence + f"the series {name} differs.", rtol=1e-6, atol=1e-6)


def _on_rank(rank: int, makes: Sequence[Make]) -> list[dict[str, tuple]]:
    """What each plug-in does to this rank's half of the batch, which is only as wide as its own longest completion."""
    halves = {}
    for case, empty in _EMPTY.items():
        tokens = rows_of(_whole(empty), slice(3 * rank, 3 * rank + 3))
        columns = max(1, int(tokens.mask.sum(-1).max()))
        narrow = {f: v[:, :columns] for f, v in tensors_of(tokens).items() if v.dim() == 2}
        recorded = narrow["old_entropy"][narrow["mask"]]
        halves[case] = replace(tokens, **narrow, rollout_entropy=recorded)
    return [{case: tuple(_outcome(make, tokens)) for case, tokens in halves.items()} for make in makes]


def _whole(empty: int | None) -> TokenBatch:
    tokens = random_batch()
    if empty is None:
        return tokens
    mask = tokens.mask.clone()
    mask[3 * empty : 3 * empty + 3] = False
    return replace(tokens, mask=mask, rollout_entropy=tokens.old_entropy[mask])


def _outcome(make: Make, tokens: TokenBatch) -> Outcome:
    signal = through(Pipeline({"it": make()}), tokens)
    series = {key: torch.stack([part.double() for part in value]) for key, value in signal.metrics.items()}
    return Outcome(of_tokens(signal), [p.mean(tokens.mask).detach() for p in signal.penalties], series)
