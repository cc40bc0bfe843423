"""Run by test_trainer_two_ranks.py: trains on fixed completions, alone or as one of two ranks, and writes what came out.

python tests/two_rank_train.py MODEL OUT WHICH     # or through torchrun
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from rl.contract import Signal, TokenBatch
from rl.pipeline import Pipeline
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.trainer import EntropyTrainer
from tiny import make_trainer

ZERO = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if ZERO:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo does it as well


class FixedRollouts(EntropyTrainer):
    """Completions are a hash of the prompt and the place in its group: the same on one rank and on two."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        seen, completions = {}, []
        for prompt in map(tuple, prompt_ids):
            place = seen[prompt] = seen.get(prompt, -1) + 1
            digest = hashlib.sha256(repr((prompt, place)).encode()).digest()
            completions.append([4 + b % 39 for b in digest[: 3 + digest[0] % 5]] + [2])
        return completions, None


class Weighted:
    """A statistic of the whole world inside a plug-in."""

    needs, neutral = frozenset(), {}

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        mean = tokens.reduce.mean(tokens.entropy, "world")
        return signal.scale((tokens.entropy.detach() / mean).clamp(max=2.0).where(tokens.mask, 1.0))


# penalty: every token counts. live: completions without advantage get no gradient. ahead: the rollout's pass records entropies.
PLUGINS = {
    "penalty": lambda: {
        "mask": ForkMask(rho=0.4),
        "rollout": ForkMask(rho=0.8, scope="rollout"),
        "band": EntropyBand(kl_coef=0.0),
        "world": Weighted(),
    },
    "live": lambda: {"mask": ForkMask(rho=0.4), "world": Weighted()},
    "ahead": lambda: {"mask": ForkMask(rho=0.4), "rollout": ForkMask(rho=0.8, scope="rollout"), "world": Weighted()},
}


def spread_in_some_groups(prompts, completions, **columns):
    return [float(len(c) % 5) * (sum(map(ord, p)) % 2) for p, c in zip(prompts, completions, strict=True)]


def main(model: str, out: str, which: str) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    lines = []
    trainer = make_trainer(
        FixedRollouts,
        model,
        f"{out}.checkpoints",
        extra={
            "sinks": [lambda step, metrics, histograms: lines.append([metrics, histograms["entropy/hist"].counts])],
            "answers": lambda texts: texts,
            "pipeline": Pipeline(PLUGINS[which]()),
        },
        **({} if which == "penalty" else {"reward": spread_in_some_groups}),
        per_device_train_batch_size=16 // world,
        gradient_accumulation_steps=1,
        max_steps=3,
        learning_rate=0.1,
        **({"ddp_backend": "gloo", "use_cpu": not ZERO} if world > 1 else {}),
    )
    trainer.train()
    assert not ZERO or trainer.model.lm_head.weight.numel() == 0  # each rank holds its part only, elsewhere
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # under ZeRO-3 every rank has a part
    if trainer.accelerator.is_main_process:
        torch.save({k: v.clone() for k, v in weights.items()}, f"{out}.pt")
        Path(f"{out}.json").write_text(json.dumps(lines))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
