"""What a model says to prompts, with everything there is to see of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl import build
from rl.draw import Decoding, complete, end_ids, prompt_ids, seed_of, undisturbed
from rl.errors import CheckpointError, ConfigError
from rl.eval_run import config_for, limited, with_tokenizer
from rl.paths import find_model
from rl.problems import grades, problem_sets
from rl.quiet import quiet
from rl.recording import TokenTexts, look_row
from rl.report.lens import Side
from rl.scoring import look
from rl.study.place import name_of

_PROMPTS, _SAMPLES = 8, 4  # held-out problems, and completions of each prompt, unless the command line says otherwise
_TOP = 5


def lens_of_model(
    target: str, prompts: Sequence[str], overrides: Sequence[str], config_dir: str | None, alike: Side | None
) -> Side:
    """Completions that a model draws now. Args: alike: a side with the same prompts, of which it takes the texts: another model's
    chat template would write them differently.

    Raises:
        CheckpointError: no model, or one without a tokenizer. ConfigError, DataError: what the configuration does wrong.
    """
    quiet()
    path = find_model(target)
    named = {o.lstrip("+~").split("=")[0] for o in overrides}
    cfg = config_for(target, overrides, config_dir)
    cfg.eval.samples = cfg.eval.samples if "eval.samples" in named else _SAMPLES
    cfg.eval.limit = cfg.eval.limit if "eval.limit" in named else _PROMPTS
    cfg.eval.ks = [1]
    if cfg.eval.temperature == 0 and "eval.samples" not in named:
        cfg.eval.samples = 1  # greedy ones are all the same
    build.use_threads(cfg.engine.threads)
    build.check_seed("eval.seed", cfg.eval.seed)
    decoding = build.decoding(cfg)
    if not isinstance(cfg.eval.samples, int) or cfg.eval.samples < 1:
        raise ConfigError(f"eval.samples={cfg.eval.samples} does not work. Expected a number of at least 1.")
    tokenizer = build.tokenizer(with_tokenizer(path), cfg.model)
    rows, graders = _rows(cfg, tokenizer, prompts)
    if not all(prompt_ids(tokenizer, row["prompt"]) for row in rows):
        # transformers 5 makes up an empty tokenizer where a folder has none
        raise CheckpointError(
            f"The tokenizer of {path} makes no tokens of a prompt. Save the model's tokenizer beside it."
        )
    model = build.language_model(path, cfg.model)
    frames = drawn(model, tokenizer, [row["prompt"] for row in rows], decoding, cfg.eval.samples, cfg.eval.seed)
    for row, grader, frame in zip(rows, graders, frames, strict=True):
        frame["reward"] = math.nan if grader is None else grades(grader, row, frame["completion"].tolist())
    joined = pd.concat(frames, ignore_index=True)
    if alike is not None:
        texts = dict(enumerate(alike.views["samples"][0].drop_duplicates("problem")["prompt"]))
        joined["prompt"] = joined["problem"].map(texts).fillna(joined["prompt"])
    how = f"{cfg.eval.samples} completions of each prompt, temperature {decoding.temperature:g}, seed {cfg.eval.seed}"
    return Side(name_of(target), how, {"samples": {0: joined}})


def _rows(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]):
    """The prompts to draw, and the grader of each: None for a prompt of the command line, of which nobody knows what is right."""
    if prompts:
        chat = tokenizer.chat_template is not None
        rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in prompts]
        return rows, [None] * len(rows)
    rows, of_row = [], []
    for problems in limited(problem_sets(cfg, tokenizer), cfg.eval.limit).values():
        rows += problems.heldout
        of_row += [problems.grader] * len(problems.heldout)
    return rows, of_row


def drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    decoding: Decoding,
    samples: int,
    seed: int,
) -> list[pd.DataFrame]:
    """For each prompt a frame of ``samples`` completions: problem, prompt, completion, and per token token_ids, tokens, entropy and
    logp (nats, at the temperature; greedy: at 1), rank, top_ids, top_tokens, top_probs."""
    ends, texts, frames = end_ids(model, tokenizer), TokenTexts(tokenizer), []
    with undisturbed(model):
        for number, prompt in enumerate(prompts):
            ids = prompt_ids(tokenizer, prompt)
            torch.manual_seed(seed_of(seed, number))
            parts, left = [], samples
            while left > 0:
                count = min(left, decoding.batch_size)
                parts.append(_batch(model, tokenizer, [ids] * count, decoding, ends, texts))
                left -= count
            text = tokenizer.decode(ids, skip_special_tokens=True) or tokenizer.decode(ids)  # of unknown words only
            frames.append(pd.concat(parts, ignore_index=True).assign(problem=number, prompt=text))
    return frames


def _batch(model, tokenizer, prompts: list[list[int]], decoding: Decoding, ends: list[int], texts: TokenTexts):
    found = complete(model, tokenizer, prompts, decoding, ends)
    seen = look(model, found.ids, found.attention, found.n, decoding.temperature or 1.0, k=_TOP)
    new, valid = found.ids[:, -found.n :], found.attention[:, -found.n :].bool()
    rows = []
    for i, mask in enumerate(valid):
        ids = new[i][mask].tolist()
        row = {"completion": tokenizer.decode(ids, skip_special_tokens=True), "token_ids": ids, "tokens": texts(ids)}
        row |= {"entropy": seen.entropy[i][mask].tolist(), "logp": seen.logp[i][mask].tolist()}
        about = {"rank": seen.rank[i], "top_ids": seen.top.ids[i], "top_logp": seen.top.logp[i]}
        rows.append(row | look_row(about, mask, texts))
    return pd.DataFrame(rows)
