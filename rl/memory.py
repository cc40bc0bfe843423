"""How much memory a run is going to take, before it starts: what each thing takes, when it is held, and what to lower first.

Bytes follow from the configuration of the model and the numbers of the run; nothing is loaded. docs/memory.md says which of them
were measured. The peak is the largest of three moments, because nothing is sampled while activations are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rl.errors import ConfigError
from rl.machine import Machine
from rl.phases import phases
from rl.sizes import (
    Sizes,
    activation_bytes,
    deepspeed_bytes,
    kv_cache_bytes,
    lora_parameters,
    optimizer_bytes,
    sizes,
)
from rl.tiles import TILE

GIB, MIB = 1 << 30, 1 << 20
Rollout = Literal["hf", "native", "vllm_colocate", "vllm_server"]
_ROLLOUTS = ("hf", "native", "vllm_colocate", "vllm_server")
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Measured (scripts/bench_memory.py): Python, torch, transformers and trl, and what they keep after a first step on a CPU.
_FRAMEWORK_CPU = 510 * MIB
# Measured: glibc keeps freed tensors below 32 MiB in its heap, in holes that the next ones do not fit. A share of all tensors;
# with LoRA once the activations of all layers, checkpointed or not; with ZeRO-3 the weights that every forward gathers anew as well.
_GLIBC = 0.25
_FRAMEWORK_CUDA = 1 * GIB  # context, libraries and their workspaces; not measured
_DEEPSPEED_CPU = 60 * MIB  # measured (scripts/bench_ranks.py)
_SLAB, _FORMED = 64 * MIB, 256 * MIB  # buffers of rl.head
_GPU_TILE = (4096, 32768)  # tokens and words of TRL's kernel (rl.kernel)
_KL_TILES, _KL_TILE = 8, 64 * MIB  # backward of the full-vocabulary KL: logits, logp, gradients of rl.scoring's tile
_QLORA_BITS = (
    4 + (8 + 32 / 256) / 64
)  # configs/peft/qlora.yaml: a scale of 8 bits for 64 weights, and one for 256 scales
_CLOSE = 0.9  # of what is available: above that a run is not said to fit


@dataclass(frozen=True)
class _Run:
    """The arguments of :func:`estimate`."""

    config: Any
    micro_batch: int
    prompt_tokens: int
    completion_tokens: int
    accumulation: int
    sequences: int  # sampled at once
    group: int
    rollout: Rollout
    device: Literal["cpu", "cuda"]
    dtype: str
    autocast: bool
    attention: str
    padded: bool
    checkpointing: bool
    optim: str
    lora_rank: int
    lora_targets: str | tuple[str, ...]
    linear_bits: float
    beta: float
    full_kl: bool
    world: int
    zero_stage: int
    offload: bool
    vllm_gpu_memory_utilization: float
    machine: Machine | None

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return _DTYPES[self.dtype]

    @property
    def compute_width(self) -> int:
        """Bytes of the input of a product in training; rollouts are sampled without autocast."""
        return 2 if self.autocast else self.width


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a process holds, by item, on ``device``; ``host``: in the RAM beside a GPU."""

    items: dict[str, int]
    host: dict[str, int]
    run: _Run

    @property
    def phases(self) -> dict[str, int]:
        """Bytes held in each phase."""
        return {
            phase: sum(self.items[name] for name in self._held(phase))
            for phase in phases(self.run.zero_stage, self.run.device)
        }

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.phases[self.peak_phase]

    @property
    def available(self) -> int | None:
        """Bytes the machine has for it, None where that is not known."""
        m = self.run.machine
        return None if m is None else m.gpu_available if self.run.device == "cuda" else m.ram_available

    def fits(self) -> bool | None:
        """Whether the peak stays below 90 % of what is available."""
        return None if self.available is None else self.total <= _CLOSE * self.available

    def lines(self) -> list[str]:
        """A table: what is held at the peak, the largest first, with its share of what the machine has."""
        where = "GPU" if self.run.device == "cuda" else "RAM"
        has = self.available
        held = sorted(self._held(self.peak_phase), key=self.items.get, reverse=True)
        rows = [(name, self.items[name]) for name in held if self.items[name]]
        rows = [*rows, (f"peak, at {self.peak_phase}", self.total)]
        out = [f"{name:<32} {_gib(n):>9}{f' {n / has:7.1%}' if has else ''}" for name, n in rows]
        out.append(f"{where + ' available':<32} {'unknown' if has is None else _gib(has):>9}")
        others = ", ".join(f"{phase} {_gib(n)}" for phase, n in self.phases.items() if phase != self.peak_phase)
        out.append(f"other moments: {others}")
        out += [f"RAM beside the GPU, {name}: {_gib(n)}" for name, n in self.host.items() if n]
        return out

    def advice(self) -> str:
        """The first setting to change: one that makes the run fit, the least harmful first; else the one that saves most."""
        if self.fits():
            return f"It fits: {_gib(self.total)} of {_gib(self.available)}."
        options = [(text, _estimate(run)) for text, run in _knobs(self)]
        options = [(text, e) for text, e in options if e.total < self.total]
        if not options:
            return (
                "Nothing in the configuration lowers the peak: take a smaller model (model=), or more GPUs with ZeRO-3."
            )
        text, best = next((o for o in options if o[1].fits()), min(options, key=lambda o: o[1].total))
        also = " That does not suffice alone." if best.fits() is False else ""
        return f"{text}: the peak goes from {_gib(self.total)} to {_gib(best.total)}.{also}"

    def _held(self, phase: str) -> list[str]:
        held = (*phases(self.run.zero_stage, self.run.device)[phase], f"allocator, {phase}")
        return [name for name in self.items if name in held]


def estimate(
    config: Any,
    *,
    micro_batch: int,
    prompt_tokens: int,
    completion_tokens: int,
    accumulation: int = 1,
    sequences: int | None = None,
    group: int = 8,
    rollout: Rollout = "hf",
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    autocast: bool = False,
    attention: str = "sdpa",
    padded: bool = True,
    checkpointing: bool = False,
    optim: str = "adamw_torch_fused",
    lora_rank: int = 0,
    lora_targets: str | Sequence[str] = "all-linear",
    linear_bits: float = 0.0,
    beta: float = 0.0,
    full_kl: bool = False,
    world: int = 1,
    zero_stage: int = 0,
    offload: bool = False,
    vllm_gpu_memory_utilization: float = 0.0,
    machine: Machine | None = None,
) -> MemoryEstimate:
    """What one process of a GRPO run holds at its peak, with every completion as long as it may be.

    Args:
        config: of the model (transformers). micro_batch: completions in one forward (``per_device_train_batch_size``).
        prompt_tokens, completion_tokens: of the longest prompt, and ``max_completion_length``.
        accumulation: ``gradient_accumulation_steps``. sequences: completions this process samples at once, None for
            ``micro_batch * accumulation`` (``per_device_train_batch_size * steps_per_generation``). group: ``num_generations``.
        dtype: of the weights as loaded; AdamW's states have it too. autocast: ``trainer.bf16``.
        attention: ``attn_implementation``; eager keeps (heads, T, T) scores. padded: prompts or completions differ in length,
            which makes sdpa keep a (T, T) mask for each layer.
        lora_rank: 0 for full fine-tuning. linear_bits: of a weight of a linear layer but the head with its scales, where weights
            are quantised (:func:`quantized_bits`); 0 where they are not. full_kl: a plug-in needs the full-vocabulary KL to the reference.
        zero_stage: of DeepSpeed, 0 for none; 1 to 3 shard optimizer state and fp32 weights, gradients, weights over ``world``.
        offload: DeepSpeed keeps the optimizer state in RAM.

    Raises:
        ConfigError: a number that is not possible, or a model that is no causal language model.
    """
    fixed = {
        "rollout": (rollout, _ROLLOUTS),
        "device": (device, ("cpu", "cuda")),
        "dtype": (dtype, tuple(_DTYPES)),
        "zero_stage": (zero_stage, (0, 1, 2, 3)),
    }
    for name, (value, allowed) in fixed.items():
        if value not in allowed:
            raise ConfigError(f"{name}={value} is not known. Expected one of: {', '.join(map(str, allowed))}.")
    if rollout == "vllm_colocate" and (machine is None or machine.gpu_total is None):
        raise ConfigError("rollout=vllm_colocate takes a share of a GPU, and none is known. Use rollout=hf or native.")
    sequences = micro_batch * accumulation if sequences is None else sequences
    counts = dict(micro_batch=micro_batch, accumulation=accumulation, sequences=sequences, group=group, world=world)
    counts |= dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name}={value} does not work. Expected at least 1.")
    targets = lora_targets if isinstance(lora_targets, str) else tuple(lora_targets)
    return _estimate(
        _Run(
            config=config, rollout=rollout, device=device, dtype=dtype, autocast=autocast, attention=attention,
            padded=padded, checkpointing=checkpointing, optim=optim, lora_rank=lora_rank, lora_targets=targets,
            linear_bits=linear_bits, beta=beta, full_kl=full_kl, zero_stage=zero_stage, offload=offload, machine=machine,
            vllm_gpu_memory_utilization=vllm_gpu_memory_utilization, **counts,
        )
    )  # fmt: skip


def quantized_bits(options: Mapping[str, Any] | None) -> float:
    """Bits of a weight that bitsandbytes quantises with ``options`` (of BitsAndBytesConfig), scales included; 0 for None."""
    if options is None:
        return 0.0
    if not options.get("load_in_4bit"):
        return 8.0  # and a scale for a row
    return _QLORA_BITS if options.get("bnb_4bit_use_double_quant") else 4 + 32 / 64


def _estimate(run: _Run) -> MemoryEstimate:
    size = sizes(run.config)
    adapters, adapted = lora_parameters(run.config, run.lora_rank, run.lora_targets) if run.lora_rank else (0, 0)
    items, host = _model_items(run, size, adapters)
    items |= _rollout_items(run, size) | _training_items(run, size, adapted)
    if run.device == "cpu":
        for phase, names in phases(run.zero_stage, run.device).items():
            gathered = items.get("live weights", 0) if "live weights" in names else 0
            items[f"allocator, {phase}"] = int(_GLIBC * sum(items.get(name, 0) for name in names)) + gathered
        if run.lora_rank:
            every = _training_items(replace(run, checkpointing=False), size, adapted)["activations"]
            items["allocator, forward/backward"] = every + items.get("live weights", 0)
    else:
        host["model while it is loaded"] = size.parameters * run.width
    cpu = _FRAMEWORK_CPU + (_DEEPSPEED_CPU if run.zero_stage else 0)
    items["framework"] = cpu if run.device == "cpu" else _FRAMEWORK_CUDA
    return MemoryEstimate(items, host, run)


def _model_items(run: _Run, size: Sizes, adapters: int) -> tuple[dict[str, int], dict[str, int]]:
    """Weights, gradients and optimizer state of one process, and what is in RAM instead."""
    n, w, ranks = size.parameters, run.width, run.world if run.zero_stage else 1
    trained = adapters or n
    # peft makes adapters in fp32; TRL turns that off for ZeRO-3, and casts them to bf16 over quantised weights
    adapter_width = 2 if run.linear_bits else w if run.zero_stage == 3 else 4
    g = adapter_width if adapters else w
    state = optimizer_bytes(trained, g, run.optim, run.zero_stage, run.world)
    gradients = trained * g // (ranks if run.zero_stage >= 2 else 1)
    part = ranks if run.zero_stage == 3 else 1
    copies = 0 if adapters else n * w // part * (run.beta != 0) + n * w * run.full_kl
    weights = n * w if not run.linear_bits else (n - size.linear) * w + int(size.linear * run.linear_bits / 8)
    gpu = run.machine.gpu_total if run.rollout == "vllm_colocate" else 0
    items = {
        "weights": weights // part,
        "a dequantised layer": size.hidden * size.intermediate * run.compute_width if run.linear_bits else 0,
        "adapters": adapters * adapter_width // part,
        "reference weights": copies,
        "optimizer state": state,
        "gradients": gradients,
        "accumulated gradients": gradients if run.accumulation > 1 and run.zero_stage < 3 else 0,
        "DDP buckets": trained * g if run.world > 1 and not run.zero_stage else 0,
        "vLLM": int(run.vllm_gpu_memory_utilization * gpu),
    }
    if run.zero_stage:
        items |= deepspeed_bytes(run.zero_stage, n, trained, run.world, w, run.device == "cpu")
        items["gathered weights"] = weights if run.zero_stage == 3 and not run.rollout.startswith("vllm") else 0
    if not run.offload:
        return items, {}
    away = {"offloaded optimizer state": state, "offloaded gradients": trained * (g + 4) // ranks}
    items |= {"fp32 gradients": 0, "accumulated gradients": 0}
    if run.device == "cpu":  # the same memory
        return items | {"gradients": away["offloaded gradients"]}, {}
    return items | {"optimizer state": 0, "gradients": 0}, away


def _rollout_items(run: _Run, size: Sizes) -> dict[str, int]:
    """What sampling holds: keys and values, logits of one step or the prefill of one layer, and copies of weights."""
    rows, prompt, w = run.sequences, run.prompt_tokens, run.width
    buffer = rows * (16 * prompt + 32 * run.completion_tokens)  # ids, masks, logp, entropy, rank
    if run.rollout.startswith("vllm"):
        return {"KV cache": 0, "sampling": 0, "rollout buffer": buffer}
    cache = kv_cache_bytes(size, rows * (prompt + run.completion_tokens), w)
    if run.rollout == "native":
        prefilled, wide = -(-rows // run.group), 4 * size.intermediate + 8 * size.hidden  # once for a group
        step = rows * size.vocabulary * 24  # fp32 logits, fp64 probabilities and their sums
        per_layer = size.hidden * (size.head_dim * (size.heads + 2 * size.kv_heads) + 2 * size.intermediate)
        joined = 0 if run.lora_rank else size.layers * per_layer * w  # projections of the same input, side by side
    else:
        prefilled, wide, joined = rows, 3 * size.intermediate + 4 * size.hidden, 0
        # logits, fp32, at the temperature, probabilities; and a layer's cache is copied to grow by a token
        step = rows * size.vocabulary * (w + 12) + cache // size.layers
    prefill = prefilled * prompt * w * wide
    if run.attention == "eager":
        prefill += prefilled * size.heads * prompt * prompt * (w + 4)
    return {"KV cache": cache, "sampling": joined + max(prefill, step), "rollout buffer": buffer}


def _training_items(run: _Run, size: Sizes, adapted: int) -> dict[str, int]:
    columns = run.prompt_tokens + run.completion_tokens
    tokens, w, c = run.micro_batch * columns, run.width, run.compute_width
    layer = tokens * activation_bytes(
        size, columns, w, c, attention=run.attention, padded=run.padded,
        lora_rank=run.lora_rank, adapted=adapted / size.layers,
    )  # fmt: skip
    kept = tokens * size.hidden * w * size.layers + layer if run.checkpointing else layer * size.layers
    kept += tokens * size.hidden * (4 + w + 2 * c)  # the last norm, and the hidden states that are scored
    if c < w:
        kept += (size.parameters - size.embedding) * c  # autocast keeps its copies of the weights
    layer_gradients = tokens * c * (4 * size.intermediate + 3 * size.hidden)
    return {"activations": kept, "loss": max(_loss_bytes(run, size), layer_gradients) + _head_gradient(run, size)}


def _loss_bytes(run: _Run, size: Sizes) -> int:
    """Buffers of rl.head and rl.kernel: a tile and slabs of bounded size, never (tokens, vocabulary)."""
    tokens, c = run.micro_batch * run.completion_tokens, run.compute_width
    states = tokens * size.hidden * (4 + c)
    kl = 0
    if run.full_kl:
        weights = 2 * size.vocabulary * size.hidden * 4 if run.width < 4 else 0  # both heads in fp32
        kl = _KL_TILES * min(_KL_TILE, 4 * tokens * size.vocabulary) + weights
    if run.device == "cuda":
        return max(min(tokens, _GPU_TILE[0]) * min(size.vocabulary, _GPU_TILE[1]) * c + states, kl)
    known = run.rollout == "native" and not (run.beta or run.full_kl)  # the gradient is formed in the forward
    slab = min(_FORMED, 4 * tokens * size.vocabulary) if known else min(_SLAB, c * tokens * TILE[1])
    return max(2 * 4 * min(tokens, TILE[0]) * TILE[1] + slab + states, kl)


def _head_gradient(run: _Run, size: Sizes) -> int:
    """The gradient of the head of one micro-batch, before it is added to the others."""
    if run.lora_rank:
        return 0
    fp32 = run.device == "cuda" or run.full_kl  # summed in fp32, then rounded
    return size.vocabulary * size.hidden * (run.width + (4 if fp32 and run.width < 4 else 0))


def _knobs(found: MemoryEstimate) -> Iterator[tuple[str, _Run]]:
    """Settings that lower memory and the run with each, the least harmful first."""
    run = found.run
    if run.attention == "eager":
        yield "model.attn_implementation=sdpa", replace(run, attention="sdpa")
    if not run.checkpointing:
        yield "trainer.activation_checkpointing=true", replace(run, checkpointing=True)
    if run.micro_batch > 1:
        size, steps = run.micro_batch // 2, run.accumulation * 2
        text = f"trainer.per_device_train_batch_size={size} trainer.gradient_accumulation_steps={steps}"
        yield text, replace(run, micro_batch=size, accumulation=steps)
    if run.rollout == "vllm_colocate":
        less = round(run.vllm_gpu_memory_utilization / 2, 2)
        yield f"trainer.vllm_gpu_memory_utilization={less}", replace(run, vllm_gpu_memory_utilization=less)
    if run.rollout == "native":
        yield "rollout=hf", replace(run, rollout="hf")
    if run.sequences > run.micro_batch and run.sequences // 2 % run.group == 0:
        steps = run.sequences // run.micro_batch // 2
        yield f"trainer.steps_per_generation={steps}", replace(run, sequences=run.sequences // 2)
    if not run.lora_rank:
        yield "peft=lora", replace(run, lora_rank=16)
    if not run.linear_bits and run.device == "cuda" and not run.rollout.startswith("vllm"):
        yield "peft=qlora", replace(run, lora_rank=run.lora_rank or 16, linear_bits=_QLORA_BITS)
    if run.world > 1 and run.zero_stage < 3:
        yield "ZeRO stage 3", replace(run, zero_stage=3)
    if run.beta and not run.lora_rank:
        yield "trainer.beta=0", replace(run, beta=0.0)
    if run.completion_tokens > 1:
        tokens = run.completion_tokens // 2
        yield f"trainer.max_completion_length={tokens}", replace(run, completion_tokens=tokens)


def _gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB"
