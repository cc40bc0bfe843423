"""The whole of GRPO with one entropy method, the fork mask, to be read from top to bottom: torch and transformers, no trainer.

    python scripts/minimal_grpo.py                 # the embedded model and task
    python scripts/minimal_grpo.py --rho 1         # plain GRPO: watch the entropy fall further

It trains what `entrl train rollout=hf` trains by default, from other random numbers: given the same completions, three updates end at
the same parameters (tests/test_minimal_grpo.py). What is simplified:

- one process, one forward per update: no gradient accumulation, no ranks, so every mean is over one batch;
- strictly on-policy: one update per rollout, so that the ratio is 1 in value and the clipping, written out here, never acts;
- no KL to a reference model, no entropy bonus, no other plug-in;
- float32 on one device; logits of the whole batch at once, which a vocabulary of 150,000 words would not fit;
- masked tokens cost as much as the others, and `generate` is slower than entrl's own sampler;
- one reward that knows this task; no checkpoints, no alarms, no records but the lines it prints.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging

from data import countdown
from rewards.countdown import solved

EMBEDDED = Path(__file__).parents[1] / "rl" / "assets" / "countdown"


@dataclass(frozen=True)
class Settings:
    """The defaults are those of `entrl train`."""

    prompts: int = 32  # a step
    group: int = 8  # completions a prompt
    max_tokens: int = 20  # a completion
    temperature: float = 1.0
    rho: float = 0.2  # share of the tokens that keep their gradient, those of highest entropy; 1 is plain GRPO
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    steps: int = 160
    learning_rate: float = 6e-4
    warmup: int = 5  # steps from 0 to the learning rate, which then stays
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 1


# ---- 1. the rollout: N = prompts x group completions, those of one prompt side by side ---------------------------------


@dataclass(frozen=True)
class Rollout:
    """Token ids and masks: prompts (N, P) padded on the left, completions (N, T) padded on the right."""

    prompt: Tensor
    prompt_mask: Tensor
    completion: Tensor
    mask: Tensor  # 1 up to and including the end of text


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], group: int, s: Settings
) -> Rollout:
    """Draw ``group`` completions of each prompt from the policy, untruncated: what is trained is what was drawn from."""
    repeated = [prompt for prompt in prompts for _ in range(group)]
    asked = tokenizer(repeated, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    whole = model.generate(
        **asked,
        do_sample=True,
        temperature=s.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=s.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    completion = whole[:, asked.input_ids.shape[1] :]
    is_end = completion == tokenizer.eos_token_id
    ended_before = is_end.cumsum(-1) - is_end.long() > 0  # the first end of text is a token the policy chose
    return Rollout(asked.input_ids, asked.attention_mask, completion, (~ended_before).long())


# ---- 2. reward and advantage --------------------------------------------------------------------------------------------


def rewards_of(rows: list[dict], texts: list[str]) -> Tensor:
    """(N,) 1 for a right solution, else 0; row i is the problem of text i."""
    numbers, targets = [row["numbers"] for row in rows], [row["target"] for row in rows]
    return torch.tensor(solved([row["prompt"] for row in rows], texts, numbers, targets))


def advantages_of(rewards: Tensor, group: int) -> Tensor:
    """(N,) ``(R - mean R) / (std R + 1e-4)`` in each group; a group of equal rewards teaches nothing."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(-1, keepdim=True)
    return (centred / (grouped.std(-1, keepdim=True) + 1e-4)).view(-1)


# ---- 3. the policy's view of what it drew -------------------------------------------------------------------------------


def score(model: PreTrainedModel, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, T) log-probability of each completion token, with gradient, and the entropy of its distribution in nats, without."""
    ids = torch.cat([rollout.prompt, rollout.completion], dim=1)
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    length = rollout.completion.shape[1]
    # logits at a position are of the next token: one position more, and the last one off
    logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=length + 1).logits[:, :-1]
    logp_all = (logits / temperature).log_softmax(-1)
    logp = logp_all.gather(-1, rollout.completion[..., None]).squeeze(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1).detach()
    return logp, entropy


# ---- 4. the method: only forking tokens keep their gradient (Beyond the 80/20 Rule, arXiv 2506.01939) ----------------------


def fork_mask(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """(N, T) bool: tokens whose entropy is at or above the (1 - rho)-quantile of all completion tokens of the batch."""
    threshold = torch.quantile(entropy[mask.bool()], 1 - rho)
    return (entropy >= threshold) & mask.bool()


# ---- 5. the loss ----------------------------------------------------------------------------------------------------------


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, keep: Tensor, mask: Tensor, s: Settings) -> Tensor:
    """``- 1/N sum_t keep_t min(r_t A, clip(r_t, 1 - low, 1 + high) A)``, N all completion tokens, dropped ones too (DAPO)."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - s.epsilon_low, 1 + s.epsilon_high)
    a = advantage[:, None]
    return -(torch.min(ratio * a, clipped * a) * keep * mask).sum() / mask.sum()


# ---- 6. one update ----------------------------------------------------------------------------------------------------------


class Learner:
    """AdamW with a clipped gradient and a learning rate that warms up, then stays."""

    def __init__(self, model: PreTrainedModel, s: Settings):
        self.model, self.s = model, s
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, betas=s.betas, weight_decay=0.0)
        warming = lambda step: min(1.0, step / max(1, s.warmup))  # noqa: E731 (the first update has rate 0, as transformers')
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warming)

    def update(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """One optimizer step; what it saw, means over completion tokens."""
        logp, entropy = score(self.model, rollout, self.s.temperature)
        keep = fork_mask(entropy, rollout.mask, self.s.rho)
        # on-policy: the policy of the rollout is the one that learns, so its log-probabilities are these, as numbers
        loss = policy_loss(logp, logp.detach(), advantages, keep, rollout.mask, self.s)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        tokens = rollout.mask.sum()
        return {
            "entropy": float((entropy * rollout.mask).sum() / tokens),
            "kept": float(keep.sum() / tokens),
            "grad_norm": float(norm),
        }


# ---- 7. all of it -------------------------------------------------------------------------------------------------------------


def solve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], group: int, s: Settings):
    """A rollout of ``group`` completions of each row, and their rewards (N,)."""
    rollout = sample(model, tokenizer, [row["prompt"] for row in rows], group, s)
    texts = tokenizer.batch_decode(rollout.completion, skip_special_tokens=True)
    rewards = rewards_of([row for row in rows for _ in range(group)], texts)
    return rollout, rewards.to(model.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rho", type=float, default=Settings.rho, help="share of tokens kept, 0 < rho <= 1; 1 is plain GRPO"
    )
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    given = parser.parse_args()
    if not 0 < given.rho <= 1:
        parser.error(f"--rho {given.rho} is no share. Expected 0 < rho <= 1; 0.2 keeps the top 20 %.")
    s = Settings(rho=given.rho, steps=given.steps, seed=given.seed)

    logging.disable_progress_bar()
    torch.manual_seed(s.seed)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # faster than several for a model of this size
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="eager")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # it has no dropout to turn on
    train = countdown.dataset("train", [4], 8192, seed=s.seed).to_list()
    heldout = countdown.dataset("heldout", [4], 200, seed=0, distinct=True).to_list()
    learner, order, began = Learner(model, s), random.Random(s.seed), time.perf_counter()

    print(f"held-out pass@1 before {solve(model, tokenizer, heldout, 4, s)[1].mean():.3f}")
    for step in range(1, s.steps + 1):
        rollout, rewards = solve(model, tokenizer, order.sample(train, s.prompts), s.group, s)
        seen = learner.update(rollout, advantages_of(rewards, s.group))
        if step == 1 or step % 10 == 0:
            print(
                f"step {step:4}/{s.steps}  reward {rewards.mean():.3f}  H {seen['entropy']:.3f}  kept {seen['kept']:.2f}"
                f"  grad {seen['grad_norm']:.2f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    print(f"held-out pass@1 after {solve(model, tokenizer, heldout, 4, s)[1].mean():.3f}")


if __name__ == "__main__":
    main()
