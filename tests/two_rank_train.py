"""Run by test_trainer_two_ranks.py: trains on fixed completions, alone or as one of two ranks, and writes what came out.

python tests/two_rank_train.py MODEL OUT CASE...     # or through torchrun, or main(...) in process
"""

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import trl.trainer.grpo_trainer
from accelerate.state import AcceleratorState

from rl.contract import Signal, TokenBatch
from rl.pipeline import Pipeline
from rl.plugins.ares import Ares
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.plugins.quantile_baseline import QuantileBaseline
from rl.plugins.rank_shaping import RankShaping
from rl.plugins.steer import Steer
from rl.plugins.target_entropy import TargetEntropy
from rl.recorder import Recorder
from rl.trainer import EntropyTrainer
from tiny import length_reward, make_trainer

ROWS = 16  # completions of a rollout's micro-batches that belong together, on all ranks


class FixedRollouts(EntropyTrainer):
    """Completions are a hash of the prompt and the place in its group: the same on one rank and on two.

    ``cut`` takes the end of text from the second half of them, which is what the second of two ranks draws.
    """

    cut = False

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        rows, ranks = len(prompt_ids), self.accelerator.num_processes
        completions = []
        for i, prompt in enumerate(map(tuple, prompt_ids), start=self.accelerator.process_index * rows):
            digest = hashlib.sha256(repr((prompt, i % num_generations)).encode()).digest()
            own = [4 + b % 39 for b in digest[: 3 + digest[0] % 5]] + [2]
            completions.append([4 + b % 39 for b in digest[:8]] if self.cut and i >= rows * ranks // 2 else own)
        return completions, None


class Cut(FixedRollouts):
    cut = True


class Weighted:
    """A statistic of the whole world inside a plug-in, which logs other series on one rank than on the other."""

    needs, neutral = frozenset(), {}

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        mean = tokens.reduce.mean(tokens.entropy, "world").clamp(min=1e-9)
        weight = (tokens.entropy.detach() / mean).clamp(max=2.0).where(tokens.mask, 1.0)
        for group in tokens.group.unique().tolist():
            signal = signal.log(f"group{group}", weight, tokens.mask & (tokens.group == group)[:, None])
        return signal.scale(weight)


def spread_in_some_groups(prompts, completions, **columns):
    return [float(len(c) % 5) * (sum(map(ord, p)) % 2) for p, c in zip(prompts, completions, strict=True)]


def spread_in_the_first_half(prompts, completions, completion_ids, **columns):
    return [0.1 * sum(ids) if ids[-1] == 2 else 0.0 for ids in completion_ids]


ACCUMULATED = {"gradient_accumulation_steps": 2}
OFF_POLICY = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}
SOME = {"reward": spread_in_some_groups}
EMPTY = {"cls": Cut, "reward": spread_in_the_first_half}  # the second rank has no advantage, masked: no token either
MASKED = {**EMPTY, "mask_truncated_completions": True}


def forks(**first):
    return {"mask": ForkMask(**first), "rollout": ForkMask(rho=0.8, scope="rollout"), "world": Weighted()}


# penalty: every token counts. live: completions without advantage get no gradient. ahead: the rollout's pass records entropies.
CASES = {
    "penalty": lambda: {
        "plugins": {**forks(rho=0.4), "band": EntropyBand(kl_coef=0.0)},
        **ACCUMULATED,
        "beta": 0.05,
    },
    "live": lambda: {"plugins": {"mask": ForkMask(rho=0.4), "world": Weighted()}, **SOME},
    "ahead": lambda: {"plugins": forks(rho=0.4), **SOME},
    "split": lambda: {"plugins": forks(rho=0.4, selector="topk"), "rows": 12},  # a group on two ranks
    "group": lambda: {
        "plugins": {
            "quantile": QuantileBaseline(),
            "ares": Ares(window=1, correct_from=2.0, kl_every=1),
            "aim": TargetEntropy(target=3.5),
        },
        "rows": 12,
    },
    "topk": lambda: {
        "plugins": {
            "mask": ForkMask(rho=0.5, selector="topk", denominator="kept"),
            "rollout": ForkMask(rho=0.8, selector="topk", scope="rollout", denominator="kept"),
            "low": ForkMask(rho=0.2, scope="response", keep="low"),
        },
        **ACCUMULATED,
        **SOME,
    },
    "steer": lambda: {
        "plugins": {"steer": Steer(scope="world"), "linear": Steer(mapping="linear", w_max=1.2, scope="world")},
        **OFF_POLICY,
    },
    "asymmetric": lambda: {
        "plugins": {
            "steer": Steer(mapping="asymmetric", form="theorem", w_max=1.3, scope="response"),
            "rank": RankShaping(lam_tail=-0.1, k=3),
        },
        **ACCUMULATED,
        "loss_type": "cispo",
        "epsilon_high": 1.1,
    },
    "recorded": lambda: {"plugins": {"mask": ForkMask(rho=0.4, policy="rollout")}, **OFF_POLICY, **SOME},
    "idle": lambda: {"plugins": forks(rho=0.4), **ACCUMULATED, **EMPTY},
    "empty": lambda: {
        "plugins": forks(rho=0.4, denominator="kept"),
        "shadows": {"steer": Steer(scope="world"), "rank": RankShaping(lam_tail=-0.1, k=3)},
        **ACCUMULATED,
        **MASKED,
    },
    "empty live": lambda: {
        # a rho without ties at its cut: a group's first tokens have one entropy, and rounding would decide between them
        "plugins": {"steer": Steer(mapping="linear", scope="world"), "mask": ForkMask(selector="topk", rho=0.8)},
        **OFF_POLICY,
        **MASKED,
    },
    "empty band": lambda: {"plugins": {"band": EntropyBand()}, **MASKED, "beta": 0.05},
}


@contextmanager
def same_micro_batches(world: int, steps: int):
    """TRL shuffles each rank's completions: here one process puts those into a micro-batch that two ranks have in theirs."""

    def arranged(rollout):
        rows = len(rollout["completion_ids"])
        order = torch.arange(rows) if world == 2 else torch.arange(rows).view(2, steps, -1).transpose(0, 1).flatten()
        return {
            k: [v[i] for i in order] if isinstance(v, list) else v[order] if v.dim() else v for k, v in rollout.items()
        }

    module = trl.trainer.grpo_trainer
    before, module.shuffle_sequence_dict = module.shuffle_sequence_dict, arranged
    try:
        yield
    finally:
        module.shuffle_sequence_dict = before


def run(model: str, out: Path, case: str, world: int, zero: bool) -> None:
    changes = {"gradient_accumulation_steps": 1, "max_steps": 3, "reward": length_reward, **CASES[case]()}
    cls, plugins, rows = changes.pop("cls", FixedRollouts), changes.pop("plugins"), changes.pop("rows", ROWS)
    lines = []
    trainer = make_trainer(
        cls,
        model,
        f"{out}/{case}.checkpoints",
        extra={
            "sinks": [lambda step, metrics, histograms: lines.append([metrics, histograms["entropy/hist"].counts])],
            "answers": lambda texts: texts,
            "pipeline": Pipeline(plugins, changes.pop("shadows", None)),
            "recorder": Recorder(out / f"{case}.rollouts", every=1, max_rows=10),
        },
        per_device_train_batch_size=rows // world,
        learning_rate=0.1,
        **changes,
        **({"ddp_backend": "gloo", "use_cpu": not zero} if world > 1 else {}),
    )
    with same_micro_batches(world, trainer.args.steps_per_generation):
        trainer.train()
    assert not zero or trainer.model.lm_head.weight.numel() == 0  # each rank holds its part only, elsewhere
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # under ZeRO-3 every rank has a part
    if trainer.accelerator.is_main_process:
        torch.save({k: v.clone() for k, v in weights.items()}, f"{out}/{case}.pt")
        (out / f"{case}.json").write_text(json.dumps(lines))
    else:
        assert not lines  # sinks are the first rank's


def main(model: str, out: str, *cases: str) -> None:
    world, zero = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    Path(out).mkdir(exist_ok=True)
    for case in cases:
        run(model, Path(out), case, world, zero)
        AcceleratorState._reset_state(
            reset_partial_state=False
        )  # DeepSpeed's settings are those of the first otherwise


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo does it as well
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
