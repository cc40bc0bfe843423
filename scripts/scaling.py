"""Which model fits on how many GPUs, with which engine, and how long a step takes: the tables of docs/scaling.md. Computed, not measured.

    python scripts/scaling.py                                    # all of them
    python scripts/scaling.py --gpus 8 --model 7b --rollout vllm_colocate
    python scripts/scaling.py --gpus 64 --model 32b --network 12.5e9 --completion 4096

GiB are the peak of a GPU after rl.memory, seconds those of rl.timing with the assumptions at its top; --flops, --memory, --link,
--network and --host put measured numbers in their place (FLOP/s and bytes/s that a process achieves).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from rl.machine import Machine
from rl.memory import GIB, MemoryEstimate, estimate
from rl.sizes import kv_cache_bytes, sizes
from rl.timing import H100, Hardware, Step, Work, step_time

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied: config.json of the model cards
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "8b": (4096, 12288, 36, 32, 8, 151936, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
}
LOCAL = "model=local model.dtype=bfloat16 model.attn_implementation=sdpa model.path="
OVERRIDES = {
    "0.5b": "model=qwen2.5_0.5b",
    "1.5b": "model=qwen2.5_math_1.5b",
    "7b": "model=qwen2.5_math_7b",
    "8b": "model=qwen3_8b_base",
    "14b": LOCAL + "Qwen/Qwen2.5-14B",
    "32b": LOCAL + "Qwen/Qwen2.5-32B",
}
CARD = 79 * GIB  # what a driver leaves of 80 GB
NODE = 8
PROMPT, GROUP, RANK, ROWS = 512, 8, 16, 128  # ROWS: completions of a GPU for one step
ENGINES = {"single": 0, "ddp": 0, "zero2": 2, "zero3": 3, "zero3_offload": 3}
ROUTES = {  # engine, LoRA
    1: [("zero2", False), ("zero3_offload", False), ("single", True)],
    8: [("ddp", False), ("zero2", False), ("zero3", False), ("zero3_offload", False), ("ddp", True), ("zero3", True)],
    64: [("zero2", False), ("zero3", False), ("zero3", True)],
}
ROLLOUTS = ("hf", "native", "vllm_colocate")
CARDS = {"400 Gbit/s a GPU": 50e9, "100 Gbit/s a GPU": 12.5e9, "100 Gbit/s a node": 12.5e9 / NODE}
_VLLM_SPACE = 4 * GIB  # activations and CUDA graphs of vLLM; assumed
_VLLM_ROWS = 16  # the fewest sequences that vLLM must be able to hold at full length


@dataclass(frozen=True)
class Plan:
    """One way to run a model on some GPUs."""

    model: str
    gpus: int
    engine: str
    lora: bool
    rollout: str
    micro_batch: int
    rows: int = ROWS
    completion: int = 2048  # max_completion_length

    @property
    def processes(self) -> int:
        return min(self.gpus, NODE)

    @property
    def fp32(self) -> bool:
        """Steps of 1e-6 round away in bf16 weights; DeepSpeed keeps fp32 ones itself, and adapters are fp32."""
        return not self.lora and ENGINES[self.engine] == 0

    @property
    def vllm(self) -> tuple[int, float]:
        """tensor_parallel_size and share of the GPU: as few GPUs as hold the weights in less than half of their memory."""
        size = sizes(config(self.model))
        for split in (1, 2, 4, 8):
            rows = kv_cache_bytes(size, _VLLM_ROWS * (PROMPT + self.completion), 2)
            share = (size.parameters * 2 / split + rows + _VLLM_SPACE) / CARD
            if share <= 0.45 or split == self.processes:
                break
        return split, max(0.3, math.ceil(share * 20) / 20)

    def memory(self) -> MemoryEstimate:
        """Of one GPU."""
        return self._estimate(self.rollout, self.rows, self.vllm[1] if self.rollout == "vllm_colocate" else 0.0)

    def _estimate(self, rollout: str, sequences: int, share: float) -> MemoryEstimate:
        return estimate(
            config(self.model), micro_batch=self.micro_batch, prompt_tokens=PROMPT, completion_tokens=self.completion,
            accumulation=self.rows // self.micro_batch, sequences=sequences, group=GROUP, rollout=rollout, device="cuda",
            dtype="float32" if self.fp32 else "bfloat16", autocast=True, checkpointing=True, lora_rank=RANK * self.lora,
            world=self.gpus, zero_stage=ENGINES[self.engine], offload=self.engine == "zero3_offload",
            vllm_gpu_memory_utilization=share, machine=Machine(2048 * GIB, 2048 * GIB, 10000 * GIB, CARD, CARD),
        )  # fmt: skip

    @property
    def eval_batch(self) -> int:
        """eval.batch_size: completions that transformers can generate at once beside what training holds; 0: it cannot."""
        beside = self.vllm[1] * CARD if self.rollout == "vllm_colocate" else 0
        counts = (1 << n for n in range(10, 3, -1))
        fitting = (n for n in counts if self._estimate("hf", n, 0.0).phases["rollout"] + beside <= 0.9 * CARD)
        return next(fitting, 0)

    def step(self, hardware: Hardware = H100) -> Step:
        """Completions are half as long as they may be in the mean, and one of each rollout as long as it may be."""
        work = Work(
            micro_batch=self.micro_batch, accumulation=self.rows // self.micro_batch, prompt=PROMPT,
            completion=self.completion // 2, longest=self.completion, group=GROUP, rollout=self.rollout,
            width=4 if self.fp32 else 2, lora_rank=RANK * self.lora,
            tensor_parallel=self.vllm[0] if self.rollout == "vllm_colocate" else 1,
        )  # fmt: skip
        return step_time(
            config(self.model), work, hardware, processes=self.processes, nodes=self.gpus // self.processes,
            zero_stage=ENGINES[self.engine], offload=self.engine == "zero3_offload",
        )  # fmt: skip

    def line(self) -> str:
        """What starts it."""
        nodes = self.gpus // self.processes
        words = ["entrl slurm submit" if nodes > 1 else "entrl train", OVERRIDES[self.model]]
        words += ["model.dtype=float32"] * self.fp32 + [f"engine={self.engine}"] * (self.engine != "single")
        words += [f"engine.nodes={nodes}"] * (nodes > 1) + [f"engine.processes={self.processes}"] * (
            self.engine != "single"
        )
        words += ["peft=lora"] * self.lora + [f"rollout={self.rollout}"]
        if self.rollout == "vllm_colocate":
            split, share = self.vllm
            words += [f"trainer.vllm_tensor_parallel_size={split}"] * (split > 1)
            words.append(f"trainer.vllm_gpu_memory_utilization={share:g}")
        words += [f"trainer.per_device_train_batch_size={self.micro_batch}"]
        words += [f"trainer.gradient_accumulation_steps={self.rows // self.micro_batch}"]
        batch = self.eval_batch
        words += [
            "trainer.activation_checkpointing=true",
            f"eval.batch_size={batch}" if batch else "eval.before=false eval.after=false",
        ]
        return " ".join(words)


def config(model: str) -> PreTrainedConfig:
    """The configuration of Qwen2.5 (8b: Qwen3) of this size."""
    hidden, wide, layers, heads, kv, words, tied = SHAPES[model]
    kind, more = (Qwen3Config, {"head_dim": 128}) if model == "8b" else (Qwen2Config, {})
    return kind(
        vocab_size=words, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def plan(
    model: str, gpus: int, engine: str, lora: bool, rollout: str, rows: int = ROWS, completion: int = 2048
) -> Plan:
    """With the largest micro-batch of at most 8 that fits, else of 1."""
    found = Plan(model, gpus, engine, lora, rollout, min(8, rows), rows, completion)
    while found.micro_batch > 1 and not found.memory().fits():
        found = replace(found, micro_batch=found.micro_batch // 2)
    return found


def best(
    model: str, gpus: int, rollout: str = "vllm_colocate", lora: bool | None = None, **numbers: int
) -> Plan | None:
    """The fastest way that fits, in bf16; ``lora`` None: full fine-tuning where that fits."""
    for adapters in (False, True) if lora is None else (lora,):
        routes = [engine for engine, with_lora in ROUTES[gpus] if with_lora == adapters]
        plans = [plan(model, gpus, engine, adapters, rollout, **numbers) for engine in routes]
        fitting = [p for p in plans if p.memory().fits() and not p.fp32]
        if fitting:
            return min(fitting, key=lambda p: p.step().total)
    return None


def memory_table(gpus: int, models: list[str], rollouts: list[str], completion: int = 2048) -> Iterator[str]:
    yield f"| {gpus} GPU{'s' * (gpus > 1)} | rollout | " + " | ".join(name.upper() for name in models) + " |"
    yield "|---|---|" + "---|" * len(models)
    for engine, lora in ROUTES[gpus]:
        for rollout in rollouts:
            plans = [plan(name, gpus, engine, lora, rollout, completion=completion) for name in models]
            cells = [_cell(p) for p in plans]
            yield f"| {engine}{', LoRA' * lora} | {rollout} | " + " | ".join(cells) + " |"


def _cell(found: Plan) -> str:
    memory = found.memory()
    return f"{memory.total / GIB:.0f} ({found.micro_batch})" if memory.fits() else f"no: {memory.total / GIB:.0f}"


PARTS = "prefill | decode | old policy | forward, backward | optimizer | communication | step, s | tokens/s a GPU |"


def time_table(gpus: int, models: list[str], rollout: str, hardware: Hardware, completion: int = 2048) -> Iterator[str]:
    yield f"| {gpus} GPU{'s' * (gpus > 1)}, {rollout} | engine | {PARTS}"
    yield "|---|---|" + "---|" * 8
    for model in models:
        found = best(model, gpus, rollout, completion=completion)
        yield f"| {model.upper()} | " + (_timed(found, hardware) if found else "does not fit |" + " |" * 8)


def _timed(found: Plan, hardware: Hardware) -> str:
    s = found.step(hardware)
    parts = (s.prefill, s.decode, s.old_policy, s.backward, s.optimizer, s.communication, s.total)
    tokens = found.rows * found.completion / 2 / s.total
    return f"{found.engine}{', LoRA' * found.lora} | " + " | ".join(map(_seconds, parts)) + f" | {tokens:,.0f} |"


def rollout_table(model: str, gpus: int, hardware: Hardware) -> Iterator[str]:
    yield f"| {model.upper()}, {gpus} GPUs | engine | {PARTS}"
    yield "|---|---|" + "---|" * 8
    for rollout in ROLLOUTS:
        yield f"| {rollout} | " + _timed(best(model, gpus, rollout), hardware)


def strong_table(model: str, completions: int, hardware: Hardware) -> Iterator[str]:
    """The same update on more and more nodes."""
    yield f"| {model.upper()}, {completions:,} completions | engine | {PARTS}"
    yield "|---|---|" + "---|" * 8
    for gpus in (8, 16, 32, 64):
        found = plan(model, gpus, "zero2", False, "vllm_colocate", completions // gpus)
        yield f"| {gpus} GPUs | " + _timed(found, hardware)


def network_table(models: list[str], hardware: Hardware) -> Iterator[str]:
    yield "| 64 GPUs: communication of a step, s | engine | " + " | ".join(CARDS) + " |"
    yield "|---|---|" + "---|" * len(CARDS)
    for model in models:
        found = best(model, 64)
        steps = [found.step(replace(hardware, network=0.8 * card)) for card in CARDS.values()]
        yield (
            f"| {model.upper()} | {found.engine} | "
            + " | ".join(f"{_seconds(s.communication)} of {_seconds(s.total)}" for s in steps)
            + " |"
        )


def _seconds(x: float) -> str:
    return f"{x:.0f}" if x >= 9.95 else f"{x:.1f}" if x >= 0.05 else "0"


def disk_table(models: list[str]) -> Iterator[str]:
    """GB of 1e9 bytes: bf16 weights, and what a run resumes from."""
    yield "| | weights, GB | a checkpoint, GB | seconds at 2 GB/s | a checkpoint with LoRA, GB | sent to a vLLM server, s |"
    yield "|---|---|---|---|---|---|"
    for model in models:
        n = sizes(config(model)).parameters
        lora = best(model, 8, lora=True)
        adapters = lora.memory().items["adapters"] * (8 if lora.engine == "zero3" else 1)
        server = Work(1, ROWS, PROMPT, 1024, 2048, rollout="vllm_server")
        sync = step_time(config(model), server, H100, processes=8, zero_stage=2).sync
        yield f"| {model.upper()} | {2 * n / 1e9:.0f} | {14 * n / 1e9:.0f} | {14 * n / 2e9:.0f} | {3 * adapters / 1e9:.1f} | {sync:.1f} |"


def tables(hardware: Hardware = H100) -> list[str]:
    """All tables of the document."""
    models = list(SHAPES)
    found = [memory_table(gpus, models, ["hf", "vllm_colocate"]) for gpus in ROUTES]
    found += [time_table(8, models, "vllm_colocate", hardware), rollout_table("7b", 8, hardware)]
    found += [strong_table("7b", 1024, hardware), network_table(["7b", "14b", "32b"], hardware), disk_table(models)]
    return ["\n".join(table) for table in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=["h100"], default="h100")
    parser.add_argument("--gpus", type=int, choices=list(ROUTES))
    parser.add_argument("--model", choices=list(SHAPES))
    parser.add_argument("--rollout", choices=ROLLOUTS)
    parser.add_argument("--completion", type=int, default=2048, help="max_completion_length (default 2048)")
    for name in ("flops", "memory", "link", "network", "host"):
        parser.add_argument(f"--{name}", type=float, default=getattr(H100, name))
    args = parser.parse_args()
    hardware = replace(H100, **{name: getattr(args, name) for name in ("flops", "memory", "link", "network", "host")})
    if not (args.gpus or args.model or args.rollout):
        return print("\n\n".join(tables(hardware)))
    models = [args.model] if args.model else list(SHAPES)
    rollouts = [args.rollout] if args.rollout else list(ROLLOUTS)
    for gpus in [args.gpus] if args.gpus else list(ROUTES):
        print(*memory_table(gpus, models, rollouts, args.completion), "", sep="\n")
        for rollout in rollouts:
            print(*time_table(gpus, models, rollout, hardware, args.completion), "", sep="\n")
            found = [best(model, gpus, rollout, completion=args.completion) for model in models]
            print(*(f"    {p.line()}" for p in found if p), "", sep="\n")


if __name__ == "__main__":
    main()
