"""What a trainer records of its rollouts: what the loss saw of each token, and a look before and one after the update.

The looks are forwards without gradient over the completions that are going to be recorded, in the model's evaluation mode: one
right after the rollout, when the policy is the one that drew them, and one after the optimizer step that they were trained in.
Every rank makes equally many calls of the model, and nothing that training depends on is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from rl.contract import Signal, TokenBatch
from rl.recorder import Recorder, Told
from rl.reduce import all_max
from rl.scoring import Recorded
from rl.sparsity import score_all


class Recording:
    """What ``trainer``, an :class:`rl.trainer.EntropyTrainer`, hands to ``recorder``.

    A row of ``rollouts/step_*.parquet``: step, group, prompt, completion, reward, reward/<name>, advantage (TRL's), and per
    trainable token

    - token_ids, tokens;
    - entropy (nats), logp: under the policy of the loss's forward. old_logp: what the loss took for the policy of the rollout,
      equal to logp in the first update on a rollout. logp_after: after the optimizer step, in evaluation mode;
    - rank (1: the likeliest), top_ids, top_tokens, top_probs (most likely first): under the policy of the rollout, at its
      temperature, before top_p and the like. Null where no look was possible (``at_rollout``);
    - kept, weight, shaped (the effective advantage).
    """

    def __init__(self, trainer: GRPOTrainer, recorder: Recorder):
        self.trainer, self.recorder = trainer, recorder
        self.texts = TokenTexts(trainer.processing_class)
        args = trainer.args
        recorder.share(
            trainer.accelerator.process_index, args.per_device_train_batch_size * args.gradient_accumulation_steps
        )

    def at_rollout(self, output: dict) -> None:
        """Look at those completions of a new rollout that are going to be recorded; what was found travels with them as ``look``.

        Nothing is found for models with images, and where an epoch ends in a smaller update, so that rollouts and updates are out
        of step, possibly for the last update on a rollout.
        """
        args, trainer, recorder = self.trainer.args, self.trainer, self.recorder
        updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        first = trainer.state.global_step + 1
        if trainer._is_vlm or not any(map(recorder.due, range(first, first + math.ceil(updates)))):
            return
        # Which updates get which completions is drawn later. On average this many give each of them its share.
        shared_by = max(1, args.steps_per_generation // args.gradient_accumulation_steps)
        group = trainer.num_generations
        end = math.ceil(shared_by * recorder.of_all / group) * group  # of all ranks' completions, whole groups
        rows = len(output["completion_ids"])
        seen, mine = min(rows, end), min(rows, max(0, end - trainer.accelerator.process_index * rows))
        ids, attention = (
            torch.cat([output[f"prompt_{x}"][:seen], output[f"completion_{x}"][:seen]], 1) for x in ("ids", "mask")
        )
        scored = output["completion_mask"][:seen].bool()
        found = self._score(ids, attention, scored, with_rank=True, with_top=recorder.alternatives)
        named = {"rank": found.rank.int(), "top_ids": found.top_ids, "top_logp": found.top_logp}
        on_cpu = {name: value.cpu() for name, value in named.items() if value is not None}
        output["look"] = [{n: v[i] for n, v in on_cpu.items()} if i < mine else None for i in range(rows)]

    def observe(self, inputs: Mapping[str, Any], tokens: TokenBatch, signal: Signal) -> None:
        """Take in what the loss sees of one micro-batch, TRL's ``inputs``, where its step is recorded."""
        step = self.trainer.state.global_step + 1
        if not self.recorder.due(step):
            return
        looks = inputs.get("look")
        rows = [i for i in range(len(tokens.mask)) if looks is None or looks[i] is not None]
        if not rows:  # of which transformers would decode one empty text
            return
        names, decode = self.trainer.reward_func_names, self.trainer.processing_class.batch_decode
        prompts = [inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist() for i in rows]
        texts = decode(prompts, skip_special_tokens=True)
        completions = decode([tokens.ids[i][tokens.mask[i]] for i in rows], skip_special_tokens=True)
        for i, prompt, text, completion in zip(rows, prompts, texts, completions, strict=True):
            rewards = inputs["rewards_per_func"][i].tolist()
            row = {"step": step, "group": int(tokens.group[i]), "prompt": text, "completion": completion}
            row |= {"reward": float(tokens.reward[i])}
            row |= {f"reward/{name}": value for name, value in zip(names, rewards, strict=True)}
            row |= token_row(tokens, signal, i, self.texts)
            if looks is not None:
                row |= look_row(looks[i], tokens.mask[i].cpu(), self.texts)
            there = inputs["completion_mask"][i].bool()
            self.recorder.add(
                step, row, Told(prompt, inputs["completion_ids"][i][there].tolist(), tokens.mask[i][there].tolist())
            )

    def before_loss(self) -> None:
        """Where the plug-ins ran ahead on what an earlier policy had recorded: look what the policy of this step says."""
        step = self.trainer.state.global_step + 1
        if self.recorder.due(step):
            self._look_again(step, {"logp": "logp", "entropy": "entropy"})

    def after_step(self) -> None:
        """Once the optimizer has stepped: look again at what was recorded of this step, and write it."""
        step = self.trainer.state.global_step
        if self.recorder.due(step):
            if not self.trainer._is_vlm:
                self._look_again(step, {"logp": "logp_after"})
            self.recorder.write(step)

    def _look_again(self, step: int, columns: Mapping[str, str]) -> None:
        """Set columns of what was recorded so far of a step, by what they hold, from the policy as it is now."""
        told = self.recorder.told(step)
        device, pad = self.trainer.accelerator.device, self.trainer._tokenizer.pad_token_id
        rows = int(all_max(torch.tensor([len(told)], device=device)))
        if not rows:
            return
        nothing = Told([pad], [pad], [False])  # where another rank has more
        batch = padded([*told, *[nothing] * (rows - len(told))], pad)
        found = self._score(*(x.to(device) for x in batch))
        for name, column in columns.items():
            values = getattr(found, name).cpu()
            self.recorder.note(column, [v[m].tolist() for v, m in zip(values, batch[2], strict=True)][: len(told)])

    def _score(
        self, ids: Tensor, attention: Tensor, scored: Tensor, with_rank: bool = False, with_top: int = 0
    ) -> Recorded:
        trainer, size = self.trainer, self.trainer.args.per_device_train_batch_size
        with torch.no_grad(), evaluating(trainer.model), trainer.accelerator.autocast():
            return score_all(trainer.model, ids, attention, scored, size, trainer.trim, with_rank, with_top)


class TokenTexts:
    """The text of single tokens; each is decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        for i in ids:
            if i not in self._known:
                self._known[i] = self._tokenizer.decode([i])
        return [self._known[i] for i in ids]


def token_row(tokens: TokenBatch, signal: Signal, i: int, texts: TokenTexts) -> dict[str, Any]:
    """What the loss saw of row ``i`` and of its trainable tokens."""
    m = tokens.mask[i]
    ids = tokens.ids[i][m].tolist()
    lists = {
        "entropy": tokens.entropy,
        "logp": tokens.logp,
        "old_logp": tokens.old_logp,
        "rank": tokens.rank,
        "kept": signal.keep,
        "weight": signal.weight,
        "shaped": signal.effective,
    }
    return {
        "advantage": float(tokens.advantages[i].max() if not m.any() else tokens.advantages[i][m][0]),
        "token_ids": ids,
        "tokens": texts(ids),
        **{name: values[i][m].tolist() for name, values in lists.items() if values is not None},
    }


def look_row(look: Mapping[str, Tensor], where: Tensor, texts: TokenTexts) -> dict[str, Any]:
    """The columns of a look at one completion: rank (T,), top_ids and top_logp (T, k). Args: where: (T,) bool."""
    row: dict[str, Any] = {"rank": look["rank"][where].tolist()}
    if "top_ids" in look:
        ids = look["top_ids"][where].tolist()
        row |= {"top_ids": ids, "top_tokens": [texts(each) for each in ids]}
        row["top_probs"] = look["top_logp"][where].float().exp().tolist()
    return row


def padded(told: Sequence[Told], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and attention, (N, P + T): prompts padded on the left, completions on the right; trainable, (N, T) bool."""
    width, length = max(len(t.prompt) for t in told), max(1, *(len(t.completion) for t in told))
    ids = torch.full((len(told), width + length), pad)
    attention, trainable = torch.zeros_like(ids), torch.zeros(len(told), length, dtype=torch.bool)
    for row, t in enumerate(told):
        there = slice(width - len(t.prompt), width + len(t.completion))
        ids[row, there] = torch.tensor([*t.prompt, *t.completion])
        attention[row, there] = 1
        trainable[row, : len(t.completion)] = torch.tensor(t.trainable, dtype=torch.bool)
    return ids, attention, trainable


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, which would take random numbers."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
