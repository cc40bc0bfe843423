"""The sizes of a decoder, and the bytes that follow from them: weights, adapters, optimizer state, keys and values, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed

from rl.errors import ConfigError

# DeepSpeed's defaults, in numbers: stage3_max_live_parameters, reduce_bucket_size, sub_group_size
LIVE_WEIGHTS, _BUCKET, _SUB_GROUP = 1_000_000_000, 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Sizes:
    """What memory depends on of a decoder. Numbers of parameters count tied weights once."""

    parameters: int
    embedding: int  # parameters of the embedding
    linear: int  # parameters of the linear layers but the head, which is what bitsandbytes quantises
    layers: int
    hidden: int
    intermediate: int  # of all experts that one token visits
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norm: bool


def _once(count: Callable[..., Any]) -> Callable[..., Any]:
    """A large model takes a second to count, and advice counts it often; configurations that read the same have the same sizes."""
    known: dict[str, Any] = {}

    @functools.wraps(count)
    def counted(config: Any, *args: Any) -> Any:
        key = f"{config.to_json_string(use_diff=False)} {args}"
        if key not in known:
            known[key] = count(config, *args)
        return known[key]

    return counted


@_once
def sizes(config: Any) -> Sizes:
    """The sizes of a transformers configuration; parameters are counted on the model itself, without memory for its weights.

    Raises:
        ConfigError: not the configuration of a causal language model.
    """
    text = config.get_text_config()
    model = on_meta(config)
    heads = text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None) if getattr(text, "moe_intermediate_size", None) else None
    wide = experts * text.moe_intermediate_size if experts else getattr(text, "intermediate_size", None)
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=model.get_input_embeddings().weight.numel(),
        linear=sum(
            m.weight.numel()
            for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
        ),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=wide or 4 * text.hidden_size,  # GPT-2 leaves it open
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
    )


@_once
def lora_parameters(config: Any, rank: int, targets: str | Sequence[str] = "all-linear") -> tuple[int, int]:
    """Parameters of the adapters that peft makes, and how many linear layers get one: ``rank (in + out)`` each.

    Raises:
        ConfigError: peft finds no such layers.
    """
    chosen = targets if isinstance(targets, str) else list(targets)
    try:
        with torch.device("meta"):
            model = get_peft_model(on_meta(config), LoraConfig(r=rank, target_modules=chosen, task_type="CAUSAL_LM"))
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"peft: r={rank}, target_modules={chosen} does not work: {reason}.") from error
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(n for _, n in trained), sum("lora_A" in name for name, _ in trained)


@contextmanager
def without_zero3() -> Iterator[None]:
    """In a rank of ZeRO-3 transformers would spread the weights of every model it makes, and there are none on meta."""
    active = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = active


def on_meta(config: Any) -> torch.nn.Module:
    """The causal language model of a configuration, without memory for its weights.

    Raises:
        ConfigError: it has none.
    """
    try:
        with torch.device("meta"), without_zero3():
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"model: {type(config).__name__} is no causal language model ({reason}). Take another model.path."
        ) from error


def kv_cache_bytes(size: Sizes, tokens: int, width: int) -> int:
    """``2 layers kv_heads head_dim width tokens``: keys and values of ``tokens`` tokens of ``width`` bytes a number."""
    return 2 * size.layers * size.kv_heads * size.head_dim * width * tokens


def optimizer_bytes(parameters: int, width: int, optim: str, zero_stage: int = 0, world: int = 1) -> int:
    """State of the optimizer for one process: AdamW's two moments of ``width`` bytes, as torch makes them like the weights.

    DeepSpeed keeps fp32 weights and fp32 moments, sharded: 12 bytes a parameter over ``world`` (ZeRO, arXiv:1910.02054, 3.1).
    The names are those of ``trainer.optim``; 8-bit AdamW takes a byte a moment, SGD and Adafactor take none worth counting.

    Raises:
        ConfigError: an optimizer whose state is not known.
    """
    if not any(known in optim for known in ("adamw", "sgd", "adafactor")):
        raise ConfigError(f"trainer.optim={optim}: its state is not known. Expected one with adamw, sgd or adafactor.")
    moments = 2 if "adamw" in optim else 0
    if zero_stage:
        return parameters * (4 + 4 * moments) // world
    return parameters * moments * (1 if "8bit" in optim else width)


def deepspeed_bytes(stage: int, parameters: int, trained: int, world: int, width: int, cpu: bool) -> dict[str, int]:
    """What DeepSpeed holds beside its shards in one process, by item.

    Args:
        cpu: memory counts once it is touched, overlapping buckets take turns, and gloo copies what it reduces and scatters.
    """
    third = stage == 3
    bucket = (min(trained, _BUCKET) if cpu else _BUCKET) * width
    return {
        "reduce buckets": bucket if cpu or third else 2 * bucket,  # overlap_comm has two in stage 2
        "reduce copies": 2 * bucket if cpu and third else bucket,
        "fp32 gradients": 4 * (min(trained // world, _SUB_GROUP) if third else trained // world),
        "live weights": min(parameters, LIVE_WEIGHTS) * width if third else 0,
    }


def activation_bytes(
    size: Sizes, columns: int, width: int, compute: int, *, attention: str = "sdpa", padded: bool = True,
    lora_rank: int = 0, adapted: float = 7,
) -> int:  # fmt: skip
    """Bytes that one layer of a Llama or Qwen decoder keeps for its backward, per token.

    A norm keeps its input in fp32 and, where its weight learns, the normed one; products keep their inputs; rotary positions
    keep nothing. Other decoders differ in the details.

    Args:
        columns: tokens of a row. width, compute: bytes of a weight, and of the input of a product.
        lora_rank: 0 for full fine-tuning. adapted: linear layers with an adapter.
    """
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    normed = 0 if lora_rank else width
    out = 2 * (size.hidden * (4 + normed + compute) + 4) + 4 * size.intermediate * compute
    if size.qk_norm:
        out += (q + kv) * (4 + (0 if lora_rank else compute)) + 4 * (size.heads + size.kv_heads)
    if compute < width:
        out += width * (q + kv)  # queries and keys before their cast
    if lora_rank:
        out += int(adapted * lora_rank * compute)
        out += compute * (3 * size.hidden + q) if compute < 4 else 0  # a cast input for every fp32 adapter
    repeated = attention == "eager" or (attention == "sdpa" and padded)
    out += compute * (2 * q + 2 * (q if repeated else kv))  # queries, output, keys, values
    if attention == "eager":
        return out + size.heads * columns * (4 + (compute if compute < 4 else 0))  # softmax in fp32, and its cast
    return out + 4 * size.heads + (compute * columns if padded and attention == "sdpa" else 0)
