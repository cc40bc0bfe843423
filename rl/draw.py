"""Drawing completions: how, from which prompt, in which batches. Each batch depends on the seed and its number only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl.errors import CheckpointError, ConfigError, Stopped
from rl.reduce import all_sum, any_rank, rank, world_size
from rl.samples import Store
from rl.scoring import score

# what a filter of the distribution is when it is off
_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}
_RANGES = {
    "temperature": (lambda x: x >= 0, "a number of at least 0; 0 is greedy"),
    "top_p": (lambda x: 0 < x <= 1, "0 < top_p <= 1; 1 is off"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "a whole number of at least 0; 0 is off"),
    "min_p": (lambda x: 0 <= x < 1, "0 <= min_p < 1; 0 is off"),
    "typical_p": (lambda x: 0 < x <= 1, "0 < typical_p <= 1; 1 is off"),
    "batch_size": (lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1"),
    "max_new_tokens": (lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1"),
}


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn, in the terms of transformers' GenerationConfig; temperature 0 is greedy.

    Raises:
        ConfigError: a value out of range, or a filter of the distribution beside temperature 0, which would do nothing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 256  # completions at a time
    min_p: float = 0.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        for name, (fits, expected) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not fits(value):
                raise ConfigError(f"eval.{name}={value} does not work. Expected {expected}.")
        for name, off in _OFF.items():
            if self.temperature == 0 and getattr(self, name) != off:
                raise ConfigError(
                    f"eval.temperature=0 is greedy, eval.{name}={getattr(self, name)} would do nothing. Leave it at {off}, "
                    "or raise eval.temperature."
                )

    def greedy(self) -> Decoding:
        """The same length and batches, greedily."""
        return replace(self, temperature=0.0, **_OFF)

    def options(self) -> dict[str, float | int | bool]:
        """For GenerationConfig."""
        if self.temperature == 0:
            return {"do_sample": False}
        # transformers applies a min_p of 0 as well
        filters = {n: getattr(self, n) for n in _OFF if n != "min_p" or self.min_p > 0}
        return {"do_sample": True, "temperature": self.temperature, **filters}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt exactly as training sees it: plain text as it is, a chat through the chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the tokenizer's end of text and every one the model declares, as in TRL's training."""
    declared = model.generation_config.eos_token_id
    if not isinstance(declared, list):
        declared = [declared]
    return sorted({i for i in (tokenizer.eos_token_id, *declared) if i is not None})


class Drawn(NamedTuple):
    """How far a drawing is. Samples and tokens count what was drawn now, not what was there already, by all ranks: while it goes
    on each is taken to do as much as this one."""

    batches: int
    of: int
    samples: int
    tokens: int
    first: bool = False  # call of a drawing


class _Batch(NamedTuple):
    problems: list[int]
    numbers: range  # of the samples to draw of each problem


def plan(lengths: Sequence[int], batch_size: int, samples: int) -> list[_Batch]:
    """Which samples are drawn together: problems of similar prompt length, at most ``batch_size`` completions at a time."""
    per_batch, at_once = max(1, batch_size // samples), min(samples, batch_size)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [
        _Batch(order[start : start + per_batch], range(first, min(first + at_once, samples)))
        for start in range(0, len(order), per_batch)
        for first in range(0, samples, at_once)
    ]


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    samples: int,
    seed: int,
    store: Store | None = None,
    progress: Callable[[Drawn], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> pd.DataFrame | None:
    """``samples`` completions of every prompt (token ids): one row each, ordered by problem and sample; ``token_ids`` go up to and
    including the end of text.

    Several ranks share the batches, and ``store`` is where the first one finds the others'; the others get None.

    A batch that ``store`` holds is taken from there, any other is put there as soon as it is drawn. Every batch has a random
    state of its own, so a drawing that was interrupted ends with the samples it would have had, in however many processes.
    The model, its mode and torch's random state are left as they were.

    Args:
        stop: asked before each batch on every rank.

    Raises:
        Stopped: ``stop`` said so on some rank; what was drawn stays in ``store``. CheckpointError: another rank's part is not there.
    """
    batches, ends = plan([len(p) for p in prompts], decoding.batch_size, samples), end_ids(model, tokenizer)
    frames: dict[int, pd.DataFrame] = {}
    fresh, tokens, world = 0, 0, world_size()
    with undisturbed(model):
        for number in range(rank(), len(batches), world):
            if stop():
                break
            batch, frame = batches[number], store.part(number) if store else None
            if frame is None:
                torch.manual_seed(seed_of(seed, number))
                frame = _draw_batch(model, tokenizer, prompts, batch, decoding, ends)
                fresh, tokens = fresh + len(frame), tokens + int(frame["tokens"].sum())
                if store:
                    store.keep(number, frame)
            frames[number] = frame
            if progress:
                progress(Drawn(number + 1, len(batches), fresh * world, tokens * world, number == rank()))
    if any_rank(stop(), model.device):  # also where every rank waits for the others' parts
        raise Stopped("a signal while drawing completions")
    drawn = all_sum(torch.tensor([fresh, tokens], device=model.device)).tolist()
    if rank() > 0:
        return None
    if progress and world > 1:
        progress(Drawn(len(batches), len(batches), *drawn))
    for number in set(range(len(batches))) - set(frames):
        if (part := store.part(number)) is None:  # which concat would leave out without a word
            raise CheckpointError(
                f"{store.parts} lacks what another process drew (part {number}). Put run.dir on a file system that all nodes share."
            )
        frames[number] = part
    return pd.concat(frames[n] for n in sorted(frames)).sort_values(["problem", "sample"], ignore_index=True)


def seed_of(seed: int, number: int) -> int:
    """A seed for torch, another one for every pair."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Draw and score within it: the model's mode, its generation defaults and torch's random state are then as they were."""
    training = model.training
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    defaults = base.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    # generate() fills what a given GenerationConfig leaves open from the model's own, which hub models use (transformers 5.23)
    base.generation_config = GenerationConfig(eos_token_id=defaults.eos_token_id)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        base.generation_config = defaults
        model.train(training)


def next_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[list[int]], decoding: Decoding
) -> torch.Tensor:
    """(prefixes, vocabulary) probabilities from which :func:`draw` takes the next token, in fp32 on the CPU: at the temperature,
    0 for what top_p and the like leave out.

    Raises:
        ValueError: a temperature of 0, which takes from none.
    """
    if decoding.temperature == 0:
        raise ValueError("temperature 0 draws from no distribution")
    rows = []
    with undisturbed(model):
        for start in range(0, len(prefixes), decoding.batch_size):
            ids, attention = _padded(prefixes[start : start + decoding.batch_size], tokenizer.pad_token_id)
            config = GenerationConfig(
                max_new_tokens=1,
                pad_token_id=tokenizer.pad_token_id,
                output_scores=True,
                return_dict_in_generate=True,
                **decoding.options(),
            )
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=attention.to(model.device), generation_config=config
            )
            rows.append(out.scores[0].float().softmax(-1).cpu())
    return torch.cat(rows)


def _padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    return ids, attention


class Completed(NamedTuple):
    """Prompts, padded on the left, and what follows them: (N, L) each, the last ``n`` columns are the completions."""

    ids: Tensor
    attention: Tensor  # int, 0 also behind a completion's end of text
    n: int
    ended: Tensor  # (N,) bool, False where the completion was cut off


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    ends: list[int],
) -> Completed:
    """One completion of each prompt (token ids), up to and including the first of ``ends``, from torch's random state as it is.

    Only this rank draws: under ZeRO-3 call it inside :func:`rl.engine.whole`.
    """
    pad = tokenizer.pad_token_id
    ids, attention = (x.to(model.device) for x in _padded(prompts, pad))
    width = ids.shape[1]
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, pad_token_id=pad, eos_token_id=ends or None, **decoding.options()
    )
    # each rank draws batches of its own, with all weights at hand also under ZeRO-3, where generate would wait for the others
    full = model.generate(input_ids=ids, attention_mask=attention, generation_config=config, synced_gpus=False)
    new = full[:, width:]
    end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    ended = end.cumsum(-1)
    valid = (ended == 0) | (end & (ended == 1))  # up to and including the first end of text
    return Completed(full, torch.cat([attention, valid.long()], 1), new.shape[1], ended[:, -1] > 0)


def _draw_batch(model, tokenizer, prompts, batch: _Batch, decoding: Decoding, ends: list[int]) -> pd.DataFrame:
    chosen, each = [prompts[i] for i in batch.problems], len(batch.numbers)
    repeated = [prompt for prompt in chosen for _ in range(each)]
    drawn = complete(model, tokenizer, repeated, decoding, ends)
    new, valid = drawn.ids[:, -drawn.n :], drawn.attention[:, -drawn.n :].bool()
    entropy = score(model, drawn.ids, drawn.attention, drawn.n, decoding.temperature or 1.0).entropy
    texts = tokenizer.batch_decode([row[m] for row, m in zip(new, valid, strict=True)], skip_special_tokens=True)
    return pd.DataFrame(
        {
            "problem": np.repeat(batch.problems, each),
            "sample": list(batch.numbers) * len(chosen),
            "completion": texts,
            "tokens": valid.sum(-1).tolist(),
            "truncated": (~drawn.ended).tolist(),
            "mean_entropy": [float(h[m].mean()) for h, m in zip(entropy, valid, strict=True)],
            "token_ids": [row[m].cpu().numpy() for row, m in zip(new, valid, strict=True)],
            "token_entropy": [h[m].float().cpu().numpy() for h, m in zip(entropy, valid, strict=True)],
        }
    )
