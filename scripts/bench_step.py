"""One optimizer step on the same recorded rollouts: entrl's fork_mask against stock TRL's top_entropy_quantile.

    python scripts/bench_step.py                  # a model of the shape of Qwen2.5-0.5B in fp32, about fifteen minutes on two cores
    python scripts/bench_step.py --dtype bf16
    python scripts/bench_step.py --quick --json step.json

Rollouts: groups of 4, lengths log-normal with a mean of a third of the longest allowed, 40 % of the groups without spread of
rewards, 5 micro-batches of 4 completions. Recorded means that logp and entropy of every token are known from the rollout, as with
rollout=native or off-policy; "in the pass" is entrl without that. "compacted" is TRL with its head on completion tokens only, as it
runs on a GPU. The step is everything between the rollout and the next one: forward, backward and the update (SGD).
Ratios are the peer's over entrl's, except grad_rel_diff: the largest over all parameters of |g - g_TRL| / |g_TRL|.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from bench_common import arguments, measured, report, rounds
from safetensors.torch import load_file, save_file

SHAPE = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
SHAPE |= {"num_attention_heads": 14, "num_key_value_heads": 2, "initializer_range": 0.02}  # Qwen2.5-0.5B
QUICK = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
# in so narrow a model the entropies of the usual initialisation differ by rounding alone, and with them the mask
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
GROUP, GROUPS, LONGEST, PROMPT = 4, 5, 192, 48
KINDS = ("trl", "compacted", "entrl", "in the pass")


def rollouts() -> dict[str, torch.Tensor]:
    """What a rollout leaves behind, padded as TRL pads it; the same for everyone."""
    g = torch.Generator().manual_seed(0)
    n = GROUP * GROUPS
    length = (torch.randn(n, generator=g) * 0.6).exp()
    length = (length * (LONGEST / 3 / length.mean())).round().clamp(1, LONGEST).long()
    prompt = torch.randint(16, PROMPT + 1, (GROUPS,), generator=g).repeat_interleave(GROUP)
    advantages = torch.randn(GROUPS, GROUP, generator=g)
    advantages = (advantages - advantages.mean(1, keepdim=True)) / advantages.std(1, keepdim=True)
    advantages[: round(0.4 * GROUPS)] = 0.0
    columns = torch.arange(LONGEST)
    return {
        "prompt_ids": torch.randint(10, 8000, (GROUPS, PROMPT), generator=g).repeat_interleave(GROUP, 0),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - prompt[:, None]).long(),
        "completion_ids": torch.randint(10, 8000, (n, LONGEST), generator=g),
        "completion_mask": (columns < length[:, None]).long(),
        "advantages": advantages.flatten(),
        "num_items_in_batch": length.sum(),
    }


def step(kind: str, shape: dict, dtype: str, threads: int, gradients: str) -> dict:
    """One optimizer step in this process; its gradients go to the file ``gradients``."""
    torch.set_num_threads(threads)
    from transformers import PrinterCallback, TrainerCallback

    from rl.quiet import quiet

    quiet()
    trainer = _trainer(kind, shape, dtype)
    parts: list[dict] = []

    class Clock(TrainerCallback):
        """Runs from the recorded rollout to the end of the update, and stands still while gradients are written."""

        def start(self):
            parts.append({})
            self.block = measured(parts[-1])
            self.block.__enter__()

        def stop(self):
            self.block.__exit__(None, None, None)

        def on_step_begin(self, *args, **kwargs):
            trainer.prepare_replay()
            self.start()

        def on_pre_optimizer_step(self, *args, **kwargs):
            self.stop()
            save_file({n: p.grad.float().contiguous() for n, p in trainer.model.named_parameters()}, gradients)
            self.start()

        def on_step_end(self, *args, **kwargs):
            self.stop()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    trainer.train()
    total = {key: sum(part[key] for part in parts) for key in ("cpu_s", "wall_s")}
    return {**total, "peak_mb": parts[0]["peak_mb"]}  # the update holds less than forward and backward


def _trainer(kind: str, shape: dict, dtype: str):
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from data import countdown
    from rl.pipeline import Pipeline
    from rl.plugins.fork_mask import ForkMask
    from rl.trainer import EntropyTrainer

    if kind == "compacted":
        trl.trainer.utils._use_triton = lambda device: (
            True
        )  # decides there whether only completion tokens are projected
    torch.manual_seed(0)
    config = Qwen2Config(**shape, tie_word_embeddings=True, pad_token_id=0, use_cache=False)
    model = Qwen2ForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        max_completion_length=LONGEST,
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=GROUPS,
        max_steps=1,
        learning_rate=1e-6,
        optim="sgd",
        max_grad_norm=0.0,
        loss_type="dapo",
        top_entropy_quantile=1.0 if kind in ("entrl", "in the pass") else 0.2,
    )
    ours = kind in ("entrl", "in the pass")
    parts = {"pipeline": Pipeline({"fork_mask": ForkMask(rho=0.2)})} if ours else {}
    return _replaying(EntropyTrainer if ours else GRPOTrainer, kind)(
        model=model,
        reward_funcs=[lambda prompts, completions, **columns: [0.0] * len(prompts)],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * GROUPS * GROUP),
        processing_class=countdown.tokenizer(),
        **parts,
    )


def _replaying(cls, kind: str):
    class Replaying(cls):
        """Generation hands out the recorded rollouts."""

        def prepare_replay(self) -> None:
            self.replay = rollouts()
            if kind == "entrl":  # what the sampler would have recorded
                both = [
                    torch.cat([self.replay[f"prompt_{x}"], self.replay[f"completion_{x}"]], 1) for x in ("ids", "mask")
                ]
                with torch.no_grad():
                    logp, entropy, _ = self._get_per_token_logps_and_entropies(
                        self.model, *both, LONGEST, batch_size=GROUP, compute_entropy=True
                    )
                self.replay |= {"old_logp": logp, "old_entropy": entropy}

        def _generate_and_score_completions(self, inputs):
            self._rollout_step = self.state.global_step
            for name in ("reward", "reward_std", "frac_reward_zero_std"):
                self._metrics["train"][name].append(0.0)
            return dict(self.replay)

    return Replaying


def largest_difference(a: str, b: str) -> float:
    ours, theirs = load_file(a), load_file(b)
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)).item() for n in theirs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    shape, repeat = (QUICK, 1) if args.quick else (SHAPE, args.repeat)
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: str(Path(folder) / f"{kind}.safetensors") for kind in KINDS}
        rows = rounds({kind: (step, (kind, shape, args.dtype, args.threads, files[kind])) for kind in KINDS}, repeat)
        difference = {kind: largest_difference(files[kind], files["trl"]) for kind in KINDS[1:]}
    for kind, value in difference.items():
        rows[kind]["grad_rel_diff"] = value
    ratios = {
        "time": rows["trl"]["cpu_s"] / rows["entrl"]["cpu_s"],
        "time_vs_compacted": rows["compacted"]["cpu_s"] / rows["entrl"]["cpu_s"],
        "time_in_the_pass": rows["trl"]["cpu_s"] / rows["in the pass"]["cpu_s"],
        "memory": rows["trl"]["peak_mb"] / rows["entrl"]["peak_mb"],
        "grad_rel_diff": difference["entrl"],
    }
    batch = rollouts()
    real = int(batch["completion_mask"].sum() + batch["prompt_mask"].sum())
    title = f"Optimizer step, {args.dtype}: {batch['completion_ids'].shape[0]} completions, {real:,} tokens, "
    report(title + f"{len(batch['advantages']) * (LONGEST + PROMPT):,} with padding", rows, ratios, args.json)


if __name__ == "__main__":
    main()
