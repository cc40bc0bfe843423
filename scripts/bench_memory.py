"""Estimated against measured peak memory of a few GRPO steps on a CPU, in fp32, each case in a process of its own.

    python scripts/bench_memory.py                # 19 M, 41 M and 115 M parameters; --repeat 1 takes half an hour
    python scripts/bench_memory.py --quick        # the small one only, three cases

peak_mb is the largest resident memory of the process, whole_mb the same where glibc returns every freed tensor to the system
(MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536), to be compared with the estimate without its allocator's share. off: estimate
/ measured - 1, and below the table its largest size; time_whole: median time with these variables over that without. MB are 1e6 bytes;
sampling counts keys and values, and is not held at the peak. Prompts have two lengths, so that there is padding.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_common import arguments, report, rounds

SMALL = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8}
SMALL |= {"num_attention_heads": 6, "num_key_value_heads": 2}  # 19 M parameters
LARGE = {"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12}
LARGE |= {"num_attention_heads": 12, "num_key_value_heads": 4}  # 115 M
MIDDLE = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10}
MIDDLE |= {"num_attention_heads": 8, "num_key_value_heads": 8}  # 41 M
RUN = {"micro_batch": 8, "prompt_tokens": 32, "completion_tokens": 64, "accumulation": 2, "group": 4}
RUN |= {"rollout": "native", "attention": "sdpa", "lora_rank": 0, "checkpointing": False, "beta": 0.0, "full_kl": False}
CASES: dict[str, dict] = {
    "native": {},
    "hf": {"rollout": "hf"},
    "checkpointing": {"checkpointing": True},
    "LoRA": {"lora_rank": 8},
    "LoRA, checkpointing": {"lora_rank": 8, "checkpointing": True},
    "one micro-batch": {"accumulation": 1},
    "192 tokens": {"completion_tokens": 192},
    "eager, 192 tokens": {"attention": "eager", "completion_tokens": 192},
    "beta": {"beta": 0.1},
    "full KL": {"full_kl": True},
}
# looked at only after the allocator's share was chosen
MIDDLE_CASES: dict[str, tuple[dict, int]] = {  # changes, optimizer steps
    "native": ({"micro_batch": 4, "completion_tokens": 96}, 10),
    "hf, checkpointing": ({"micro_batch": 16, "rollout": "hf", "checkpointing": True}, 3),
    "LoRA, hf": ({"micro_batch": 4, "completion_tokens": 96, "rollout": "hf", "lora_rank": 16}, 3),
    "LoRA, checkpointing": ({"micro_batch": 4, "completion_tokens": 96, "lora_rank": 16, "checkpointing": True}, 10),
}
LARGE_CASES = ("native", "hf", "checkpointing", "LoRA", "LoRA, checkpointing", "one micro-batch")
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def config(shape: dict, attention: str = "sdpa"):
    """A Qwen2 of this shape whose completions never end, so that every one is as long as it may be."""
    from transformers import Qwen2Config

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return Qwen2Config(**shape, tie_word_embeddings=True, attn_implementation=attention, **special)


def estimated(shape: dict, changes: dict) -> dict[str, float]:
    """Total and parts of the estimate, in MB."""
    from rl.memory import estimate

    found = estimate(config(shape), **{**RUN, **changes})
    held = found.items
    allocator = held[f"allocator, {found.peak_phase}"]
    parts = {
        "weights": held["weights"] + held["adapters"] + held["reference weights"],
        "optimizer": held["optimizer state"],
        "gradients": held["gradients"],
        "activations": held["activations"],
        "loss": held["loss"],
        "sampling": held["KV cache"] + held["sampling"],
        "allocator": allocator,
    }
    total = {"estimate_mb": found.total, "estimate_whole_mb": found.total - allocator}
    return {name: n / 1e6 for name, n in (total | parts).items()}


def measured(shape: dict, changes: dict, steps: int, threads: int) -> dict[str, float]:
    """Peak memory of this process, in MB, after ``steps`` optimizer steps of a real trainer."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer(shape, {**RUN, **changes}, steps, Path(folder)).train()
    return {"peak_mb": peak(), "wall_s": time.perf_counter() - start}


def peak() -> float:
    """MB. ru_maxrss counts what the parent held when it started this process; the kernel's own mark does not."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024 / 1e6


def trainer(shape: dict, run: dict, steps: int, folder: Path):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Qwen2ForCausalLM
    from trl import GRPOConfig

    from data import countdown
    from rl.pipeline import Pipeline
    from rl.plugins.entropy_band import EntropyBand
    from rl.plugins.fork_mask import ForkMask
    from rl.quiet import quiet
    from rl.rollout import NativeSampler
    from rl.trainer import EntropyTrainer

    quiet()
    torch.manual_seed(0)
    random.seed(0)
    model = Qwen2ForCausalLM(config(shape, run["attention"]))
    if run["beta"]:  # TRL loads the reference from where the policy came from
        model.save_pretrained(folder / "model")
        model = Qwen2ForCausalLM.from_pretrained(folder / "model", attn_implementation=run["attention"])
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        activation_checkpointing=run["checkpointing"],
        max_completion_length=run["completion_tokens"],
        num_generations=run["group"],
        per_device_train_batch_size=run["micro_batch"],
        gradient_accumulation_steps=run["accumulation"],
        max_steps=steps,
        learning_rate=1e-6,
        beta=run["beta"],
    )
    lengths = [run["prompt_tokens"] // (1 + i % 2) for i in range(64)]
    plugin = {"entropy_band": EntropyBand()} if run["full_kl"] else {"fork_mask": ForkMask(rho=0.2)}
    rank = run["lora_rank"]
    adapters = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    return EntropyTrainer(
        model=model,
        reward_funcs=[lambda prompts, completions, **columns: [random.random() for _ in prompts]],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": " ".join(["1"] * n)} for n in lengths]),
        processing_class=countdown.tokenizer(),
        pipeline=Pipeline(plugin),
        sampler=NativeSampler(model.config, args) if run["rollout"] == "native" else None,
        peft_config=adapters,
    )


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that child processes see from their start."""
    os.environ |= values
    yield
    for name in values:
        del os.environ[name]


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    cases = {f"19 M, {name}": (SMALL, changes, 3) for name, changes in CASES.items()}
    cases |= {f"115 M, {name}": (LARGE, {"completion_tokens": 96, **CASES[name]}, 3) for name in LARGE_CASES}
    cases |= {f"41 M, {name}": (MIDDLE, *case) for name, case in MIDDLE_CASES.items()}
    repeat = 1 if args.quick else args.repeat
    if args.quick:
        cases = {name: cases[name] for name in ("19 M, native", "19 M, hf", "19 M, LoRA")}
    work = {name: (measured, (*case, args.threads)) for name, case in cases.items()}
    found = rounds(work, repeat)
    with environment(GLIBC):
        whole = rounds(work, repeat)
    rows, parts = {}, {}
    for name, (shape, changes, _) in cases.items():
        parts[name] = estimated(shape, changes)
        total, without = parts[name].pop("estimate_mb"), parts[name].pop("estimate_whole_mb")
        rows[name] = {"peak_mb": found[name]["peak_mb"], "estimate": total, "off": total / found[name]["peak_mb"] - 1}
        rows[name] |= {"whole_mb": whole[name]["peak_mb"], "off_whole": without / whole[name]["peak_mb"] - 1}
    ratios = {key: max(abs(row[key]) for row in rows.values()) for key in ("off", "off_whole")}
    ratios["time_whole"] = statistics.median(whole[name]["wall_s"] / found[name]["wall_s"] for name in cases)
    report("Parts of the estimate, MB", parts, {}, None)
    report(f"Peak memory, {args.threads} threads", rows, ratios, args.json)


if __name__ == "__main__":
    main()
