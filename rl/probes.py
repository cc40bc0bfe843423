"""The same few held-out problems looked at again and again, so that one can watch a completion change as the policy does.

``probes/step_000000.parquet`` before training, then every so many steps and after the last planned one (a run that
a signal or an alarm ends gets none there). A row is a completion of a problem:
step, problem (its number among the held-out ones), kind, prompt, completion, reward (NaN where the grader has none), and per token
token_ids, tokens, entropy (nats), logp, rank (1: the likeliest), top_ids, top_tokens, top_probs, all under the policy of that step
at the temperature of the rollouts. kind is

- fixed: the completion that the policy of the run's first probe drew, scored by the policy of this step;
- fresh: one that the policy of this step has drawn, from the same random numbers at every step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer

from rl.draw import Decoding, complete, end_ids, prompt_ids, undisturbed
from rl.engine import whole
from rl.errors import user_errors
from rl.problems import Grader
from rl.recorder import Told, write_rows
from rl.recording import TokenTexts, look_row, padded
from rl.reduce import rank
from rl.sparsity import score_all


class Probes(TrainerCallback):
    """Writes the probes of ``trainer``, an :class:`rl.trainer.EntropyTrainer`; the first rank draws and scores.

    Parameters, gradients, random states and series stay as they would be without it.

    Args:
        folder: where to write, created when needed. problems: rows with a prompt and what the grader wants to know. every: steps
            between probes. seed: of what is drawn. alternatives: so many of the likeliest words in each token's place.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        folder: Path,
        problems: Sequence[Mapping[str, Any]],
        grader: Grader,
        *,
        every: int,
        seed: int,
        alternatives: int = 5,
    ):
        self.trainer, self.folder, self.problems, self.grader = trainer, Path(folder), list(problems), grader
        self.every, self.seed, self.alternatives = every, seed, alternatives
        args, self.tokenizer = trainer.args, trainer._tokenizer
        self.prompts = [prompt_ids(self.tokenizer, row["prompt"]) for row in self.problems]
        self.texts = TokenTexts(self.tokenizer)
        self.decoding = Decoding(
            args.max_completion_length, args.temperature, args.top_p, args.top_k or 0, min_p=args.min_p or 0.0
        )
        self._fixed: dict[int, list[int]] | None = None  # problem -> completion
        self._warned = False

    def due(self, step: int, last: int) -> bool:
        """Whether there is a probe after this step of a run of ``last`` steps."""
        return step % self.every == 0 or step == last

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.look(0)
            self.trainer.meter.start()  # the first step begins now

    def on_step_end(self, args, state, control, **kwargs):
        if self.due(state.global_step, state.max_steps):
            self.look(state.global_step)

    def look(self, step: int) -> None:
        """Write the probe of this step; every rank must call it."""
        trainer = self.trainer
        with whole(trainer.model_wrapped, trainer.accelerator) as model:
            if rank() == 0:
                write_rows(self.folder / f"step_{step:06d}.parquet", self._rows(model, step))

    def _rows(self, model: PreTrainedModel, step: int) -> list[dict[str, Any]]:
        trainer, count = self.trainer, len(self.problems)
        with undisturbed(model):
            torch.manual_seed(self.seed)
            drawn = complete(model, self.tokenizer, self.prompts, self.decoding, end_ids(model, self.tokenizer))
            there = drawn.attention[:, -drawn.n :].bool()
            fresh = [ids[m].tolist() for ids, m in zip(drawn.ids[:, -drawn.n :], there, strict=True)]
            if self._fixed is None:
                self._fixed = first_completions(self.folder, count)
            fixed = [self._fixed.setdefault(i, ids) for i, ids in enumerate(fresh)]
            told = [Told(p, c, [True] * len(c)) for p, c in zip(self.prompts * 2, fixed + fresh, strict=True)]
            batch = padded(told, self.tokenizer.pad_token_id)
            with trainer.accelerator.autocast():
                found = score_all(
                    model,
                    *(x.to(model.device) for x in batch),
                    trainer.args.per_device_train_batch_size,
                    trainer.trim,
                    with_rank=True,
                    with_top=self.alternatives,
                )
        texts = self.tokenizer.batch_decode([t.completion for t in told], skip_special_tokens=True)
        shown = self.tokenizer.batch_decode(self.prompts, skip_special_tokens=True)
        rewards = self._rewards(texts)
        known = {name: value.cpu() for name, value in found._asdict().items() if value is not None}
        rows = []
        for i, (each, where) in enumerate(zip(told, batch[2], strict=True)):
            problem, kind = i % count, "fixed" if i < count else "fresh"
            row = {"step": step, "problem": problem, "kind": kind, "prompt": shown[problem], "completion": texts[i]}
            row |= {"reward": rewards[i], "token_ids": each.completion, "tokens": self.texts(each.completion)}
            row |= {name: known[name][i][where].tolist() for name in ("entropy", "logp")}
            look = {name: known[name][i] for name in ("rank", "top_ids", "top_logp") if name in known}
            rows.append(row | look_row(look, where, self.texts))
        return rows

    def _rewards(self, completions: Sequence[str]) -> list[float]:
        twice = self.problems * 2
        columns = {name: [row[name] for row in twice] for name in twice[0] if name != "prompt"}
        try:
            grades = self.grader(prompts=[row["prompt"] for row in twice], completions=list(completions), **columns)
        except user_errors() as error:
            # problems without labels have nothing to grade by, and a training need not end of it
            if not self._warned:
                warnings.warn(f"probes are recorded without rewards: {error}", stacklevel=2)
            self._warned, grades = True, [None] * len(twice)
        return [math.nan if grade is None else float(grade) for grade in grades]


def first_completions(folder: Path, count: int) -> dict[int, list[int]]:
    """The fixed completion of each of the first ``count`` problems, as far as earlier probes in ``folder`` have one."""
    found: dict[int, list[int]] = {}
    for path in sorted(folder.glob("step_*.parquet")):
        rows = pd.read_parquet(path, columns=["problem", "kind", "token_ids"]).query("kind == 'fixed'")
        for problem, ids in zip(rows["problem"], rows["token_ids"], strict=True):
            found.setdefault(int(problem), ids.tolist())
        if all(i in found for i in range(count)):
            break
    return found
