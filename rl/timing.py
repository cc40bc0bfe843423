"""How long a step is going to take: operations and bytes counted from the configuration of the model, over what the hardware achieves.

Nothing overlaps here, so a step is the sum of its parts. docs/scaling.md says what was measured and what is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl.sizes import LIVE_WEIGHTS, Sizes, kv_cache_bytes, lora_parameters, sizes

_SAMPLING_BYTES = 24  # a word of the vocabulary and a token: logits, probabilities, their sums
_TENSORS_A_LAYER = 12
_ADAM_BYTES = 28  # a trained fp32 number of DeepSpeed: weight and moments read and written, gradient read


@dataclass(frozen=True)
class Hardware:
    """What one process achieves, not what a data sheet promises. Seconds, bytes/s and FLOP/s."""

    flops: float  # products of training, prefill and decode
    memory: float  # reads of weights, keys and values
    link: float  # sent to the other processes of the node
    network: float  # sent to other nodes
    host: float  # to and from the RAM, all processes of a node at once
    layer: dict[str, float]  # a decoder layer takes at least this for a token, by rollout
    update: float = 0.01  # a tensor handed to a vLLM server


# Data sheet: 989 TFLOP/s in dense bf16, 3.35 TB/s, NVLink 450 GB/s a direction, 400 Gbit/s InfiniBand a GPU, PCIe 5. The shares and the
# seconds a layer are assumptions: 40 %, 60 %, 70 %, 80 %; hf and native are bound by their launches, vLLM has CUDA graphs.
H100 = Hardware(
    flops=0.40 * 989e12,
    memory=0.60 * 3.35e12,
    link=0.70 * 450e9,
    network=0.80 * 50e9,
    host=20e9,
    layer={"hf": 1e-3, "native": 4e-4, "vllm_colocate": 1e-4, "vllm_server": 1e-4},
)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step of the run, by part."""

    prefill: float
    decode: float
    old_policy: float
    backward: float  # and forward
    optimizer: float
    gather_for_rollout: float
    gradients: float
    gather: float
    sync: float

    @property
    def rollout(self) -> float:
        """Sampling, and what has to be sent before."""
        return self.prefill + self.decode + self.gather_for_rollout + self.sync

    @property
    def communication(self) -> float:
        return self.gather_for_rollout + self.gradients + self.gather + self.sync

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Work:
    """What one process does for one optimizer step, on-policy: every rollout is used once.

    Tokens are means but ``longest``, the longest completion of a rollout, for which all others wait.
    """

    micro_batch: int
    accumulation: int
    prompt: int
    completion: int
    longest: int
    group: int = 8
    rollout: str = "hf"
    width: int = 2  # bytes of a weight
    checkpointing: bool = True
    lora_rank: int = 0
    tensor_parallel: int = 1  # of vLLM
    servers: int = 8  # GPUs of the vLLM server
    old_policy: bool | None = None  # a pass over the rollout; None: with vLLM

    @property
    def sequences(self) -> int:
        return self.micro_batch * self.accumulation


def step_time(
    config: Any, work: Work, hardware: Hardware, *, processes: int = 1, nodes: int = 1, zero_stage: int = 0, offload: bool = False
) -> Step:  # fmt: skip
    """Seconds of an optimizer step of ``processes`` on each of ``nodes``."""
    size = sizes(config)
    world = processes * nodes
    trained = lora_parameters(config, work.lora_rank)[0] if work.lora_rank else size.parameters
    prefill, decode = rollout_time(size, _body(config, size), work, hardware, world)
    training = training_time(size, _body(config, size), work, hardware)
    collective = _Collective(hardware, processes, nodes)
    weights = size.parameters * _sampling_width(work)
    passes = -(-work.sequences // work.micro_batch) if training["old_policy"] else 0
    vllm = work.rollout.startswith("vllm")
    sync = 0.0
    if vllm:
        sync = 2 * weights / hardware.memory + collective.all_gather(weights) * (zero_stage == 3)
    if work.rollout == "vllm_server":
        sync += weights / hardware.network + size.layers * _TENSORS_A_LAYER * hardware.update
    return Step(
        prefill=prefill,
        decode=decode,
        old_policy=training["old_policy"],
        backward=training["backward"],
        optimizer=_optimizer_time(trained, work, hardware, processes, nodes, zero_stage, offload),
        gather_for_rollout=collective.all_gather(weights) if zero_stage == 3 and not vllm else 0.0,
        gradients=_gradient_time(trained * work.width, work, collective, zero_stage),
        gather=_gather_time(size, trained, passes, work, collective, zero_stage),
        sync=sync,
    )


def _body(config: Any, size: Sizes) -> int:
    """Parameters in the layers, without embedding and head."""
    return size.parameters - size.embedding * (1 if config.get_text_config().tie_word_embeddings else 2)


def rollout_time(size: Sizes, body: int, work: Work, hardware: Hardware, world: int = 1) -> tuple[float, float]:
    """Seconds of prefill and of decoding. A decode step reads the weights once and every running row's keys and values."""
    rows = work.sequences * work.tensor_parallel
    if work.rollout == "vllm_server":
        rows = -(-work.sequences * world // (work.servers // work.tensor_parallel))
    split = work.tensor_parallel
    prompts = rows if work.rollout == "hf" else -(-rows // work.group)
    prefill = prompts * work.prompt * 2 * body / (hardware.flops * split)
    tokens = rows * (work.longest if work.rollout == "hf" else work.completion)  # the others drop rows that have ended
    columns = work.prompt + (work.longest if work.rollout == "hf" else work.completion) / 2
    weights = (body + size.embedding) * _sampling_width(work)
    cache = kv_cache_bytes(size, 1, _sampling_width(work)) * tokens * columns
    if work.rollout == "hf":  # copied to grow by a token, and repeated for every head
        repeated = size.heads / size.kv_heads
        cache *= 3 if repeated == 1 else 3 + 2 * repeated
    logits = tokens * size.vocabulary * _SAMPLING_BYTES
    bound = (work.longest * weights + cache + logits) / (hardware.memory * split)
    attention = 4 * size.layers * size.heads * size.head_dim * columns
    computed = tokens * (2 * (body + size.embedding) + attention) / (hardware.flops * split)
    launches = work.longest * size.layers * hardware.layer[work.rollout]
    return prefill, max(bound, computed) + launches


def _sampling_width(work: Work) -> int:
    """Bytes of a weight while sampling; vLLM loads what is on the disk, bf16."""
    return 2 if work.rollout.startswith("vllm") else work.width


def training_time(size: Sizes, body: int, work: Work, hardware: Hardware) -> dict[str, float]:
    """Seconds of the old-policy pass and of forward and backward, every completion token with gradient.

    6 operations a parameter and token (LoRA: 4, the frozen weights have no gradient), 2 more where activations are computed again, but
    for the last product of a layer, which nothing needs; attention over all columns; the head on completion tokens only, its forward twice.
    """
    columns = work.prompt + work.completion
    tokens, scored = work.sequences * columns, work.sequences * work.completion
    attention = 4 * size.layers * size.heads * size.head_dim * columns
    forward, head = 2 * body + attention, 2 * size.embedding
    again = (forward - 2 * size.layers * size.hidden * size.intermediate) * work.checkpointing
    backward = tokens * (forward + 2 * attention + 2 * body * (1 if work.lora_rank else 2) + again)
    backward += scored * head * (3 if work.lora_rank else 4)
    old = work.rollout.startswith("vllm") if work.old_policy is None else work.old_policy
    return {
        "old_policy": (tokens * forward + scored * head) / hardware.flops * old,
        "backward": backward / hardware.flops,
    }


@dataclass(frozen=True)
class _Collective:
    """Rings over all processes: what a node needs from the others comes over the network cards of all its processes at once."""

    hardware: Hardware
    processes: int
    nodes: int

    def all_gather(self, size: float) -> float:
        """Seconds until every process has all of ``size`` bytes; a reduce-scatter takes as long, an all-reduce twice as long."""
        world = self.processes * self.nodes
        within = size * (world - 1) / world / self.hardware.link
        across = size * (self.nodes - 1) / self.nodes / (self.processes * self.hardware.network)
        return max(within, across)


def _gradient_time(size: float, work: Work, collective: _Collective, zero_stage: int) -> float:
    """DDP: one all-reduce a step. ZeRO-2 and 3: a reduce-scatter a micro-batch; ZeRO-2 then gathers the new weights."""
    if zero_stage == 0:
        return 2 * collective.all_gather(size)
    scatter = work.accumulation * collective.all_gather(size)
    return scatter + collective.all_gather(size) * (zero_stage < 3)


def _gather_time(size: Sizes, trained: int, passes: int, work: Work, collective: _Collective, zero_stage: int) -> float:
    """ZeRO-3: weights for every forward and, above what may stay, for every backward again."""
    if zero_stage < 3:
        return 0.0
    again = 2 if size.parameters > LIVE_WEIGHTS else 1  # smaller models stay gathered between forward and backward
    return (work.accumulation * again + passes) * collective.all_gather(size.parameters * work.width)


def _optimizer_time(trained: int, work: Work, hardware, processes: int, nodes: int, zero_stage: int, offload: bool):
    if not zero_stage:
        return 7 * trained * work.width / hardware.memory  # weights and moments read and written, gradients read
    part = trained / (processes * nodes)
    if offload:  # the RAM serves all processes of the node
        return processes * part * (_ADAM_BYTES + 2 * work.width) / hardware.host
    return part * _ADAM_BYTES / hardware.memory
