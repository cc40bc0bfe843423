"""Sampled rollouts with everything known of each token, as parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rl.contract import Signal, TokenBatch


class Recorder:
    """Writes ``rollouts/step_000010.parquet``: one row a completion, lists over its trainable tokens.

    Columns: step, group, prompt, completion, reward, reward/<name>, advantage (TRL's), and per token token_ids, tokens,
    entropy (nats), logp, rank where known, kept, weight, shaped (the effective advantage).

    Args:
        folder: where to write, created when needed. every: record every so many steps, and the first. max_rows: completions a
            step, of all ranks together.
    """

    def __init__(self, folder: Path, *, every: int, max_rows: int):
        self.folder, self.every, self.max_rows = Path(folder), every, max_rows
        self.rank = 0
        self._step, self._rows = 0, []

    def share(self, rank: int, rows: int) -> None:
        """Several processes record ``rows`` completions a step each: those above 0 write what is left of ``max_rows`` by those
        before them, as ``step_000010.rank1.parquet``, so that together it is the first groups."""
        self.rank, self.max_rows = rank, max(0, self.max_rows - rank * rows)

    def due(self, step: int) -> bool:
        """Whether the rollouts of this step are recorded."""
        return self.every > 0 and (step == 1 or step % self.every == 0)

    def observe(
        self,
        step: int,
        tokens: TokenBatch,
        signal: Signal,
        *,
        prompts: Sequence[str],
        completions: Sequence[str],
        token_texts: Sequence[Sequence[str]],
        rewards: Mapping[str, Sequence[float]],
    ) -> None:
        """Add the rows of one micro-batch; the file of a step is written anew as its micro-batches arrive."""
        if step != self._step:
            self._step, self._rows = step, []
        for i in range(len(prompts)):
            m = tokens.mask[i]
            row = {
                "step": step,
                "group": int(tokens.group[i]),
                "prompt": prompts[i],
                "completion": completions[i],
                "reward": float(tokens.reward[i]),
                **{f"reward/{name}": float(values[i]) for name, values in rewards.items()},
                "advantage": float(tokens.advantages[i].max() if not m.any() else tokens.advantages[i][m][0]),
                "token_ids": tokens.ids[i][m].tolist(),
                "tokens": list(token_texts[i]),
                "entropy": tokens.entropy[i][m].detach().float().tolist(),
                "logp": tokens.logp[i][m].detach().float().tolist(),
                "kept": signal.keep[i][m].tolist(),
                "weight": signal.weight[i][m].float().tolist(),
                "shaped": signal.effective[i][m].float().tolist(),
            }
            if tokens.rank is not None:
                row["rank"] = tokens.rank[i][m].tolist()
            self._rows.append(row)
        self._write()

    def _write(self) -> None:
        # Rows arrive shuffled; whole groups are what a reader wants to compare, so take the first groups.
        if not self.max_rows:
            return
        frame = pd.DataFrame(self._rows).sort_values(["group", "completion"], kind="stable").head(self.max_rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = f".rank{self.rank}" if self.rank else ""
        path = self.folder / f"step_{self._step:06d}{suffix}.parquet"
        partial = path.with_suffix(".partial")
        frame.to_parquet(partial, index=False)
        partial.replace(path)

    def sample(self, count: int) -> list[dict]:
        """A few rows of the last recorded step, best and worst reward first, for people to read."""
        rows = sorted(self._rows, key=lambda row: (-row["reward"], -row["group"]))
        count = min(count, len(rows))
        best = (count + 1) // 2
        return rows[:best] + rows[len(rows) - (count - best) :][::-1]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], mask: Tensor, reward_names: Sequence[str]
) -> dict[str, Any]:
    """What ``observe`` wants to know beyond the tokens, of TRL's ``inputs`` whose trainable tokens are in ``mask``."""
    prompts = [ids[m.bool()] for ids, m in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    completions = [ids[m] for ids, m in zip(inputs["completion_ids"], mask, strict=True)]
    return {
        "prompts": tokenizer.batch_decode(prompts, skip_special_tokens=True),
        "completions": tokenizer.batch_decode(completions, skip_special_tokens=True),
        "token_texts": [[tokenizer.decode(i) for i in ids] for ids in completions],
        "rewards": {name: inputs["rewards_per_func"][:, i].tolist() for i, name in enumerate(reward_names)},
    }
