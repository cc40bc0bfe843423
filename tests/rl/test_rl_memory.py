"""Bytes counted by hand, by peft and by autograd; the sum against what a real run takes."""

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from rl.errors import ConfigError
from rl.machine import Machine, machine
from rl.memory import estimate, quantized_bits
from rl.sizes import activation_bytes, kv_cache_bytes, lora_parameters, optimizer_bytes, sizes

SCRIPTS = Path(__file__).parents[2] / "scripts"
GIB = 1 << 30
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SEVEN = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
RUN = {"micro_batch": 4, "prompt_tokens": 16, "completion_tokens": 48, "accumulation": 2}
BIG = {"micro_batch": 8, "prompt_tokens": 512, "completion_tokens": 2048, "accumulation": 16, "device": "cuda"}
BIG |= {"dtype": "bfloat16", "autocast": True}


def config(cls=Qwen2Config, **changes):
    return cls(**{**SMALL, "tie_word_embeddings": True, **changes})


def gpu(gib):
    return Machine(
        ram_total=256 * GIB, ram_available=200 * GIB, disk_free=GIB, gpu_total=gib * GIB, gpu_available=gib * GIB
    )


def test_parameters_are_counted_once_where_they_are_tied():
    attention = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64  # q with bias, k and v with bias, o
    layer = attention + 3 * 64 * 160 + 2 * 64
    assert sizes(config()).parameters == 100 * 64 + 2 * layer + 64
    assert sizes(config(tie_word_embeddings=False)).parameters == 2 * 100 * 64 + 2 * layer + 64
    assert sizes(SEVEN).parameters == 7_615_616_512  # as published for Qwen2.5-7B


def test_other_decoders_have_their_own_names_and_experts():
    gpt2 = sizes(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=64))
    assert (gpt2.layers, gpt2.hidden, gpt2.intermediate, gpt2.kv_heads, gpt2.head_dim) == (2, 32, 128, 4, 8)
    experts = config(Qwen3MoeConfig, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16)
    assert sizes(experts).intermediate == 2 * 48 and sizes(experts).qk_norm


@pytest.mark.parametrize(("stage", "gib"), [(0, 16 * 2), (1, 16 * 12 / 8), (2, 16 * 12 / 8), (3, 16 * 12 / 8)])
def test_optimizer_state_of_16_gi_parameters_on_8_ranks(stage, gib):
    assert optimizer_bytes(16 * GIB, 1, "adamw_torch_fused", zero_stage=stage, world=8) == gib * GIB


def test_optimizer_state_has_the_dtype_of_the_weights():
    assert optimizer_bytes(10, 4, "adamw_torch") == 80 and optimizer_bytes(10, 2, "adamw_torch") == 40
    assert optimizer_bytes(10, 4, "adamw_bnb_8bit") == 20 and optimizer_bytes(10, 4, "sgd") == 0
    with pytest.raises(ConfigError, match="trainer.optim=lion_32bit"):
        optimizer_bytes(10, 4, "lion_32bit")


def test_zero_shards_state_then_gradients_then_weights():
    n = sizes(SEVEN).parameters
    found = [estimate(SEVEN, world=8, zero_stage=stage, **BIG).items for stage in range(4)]
    assert [f["weights"] for f in found] == [2 * n, 2 * n, 2 * n, 2 * n // 8]
    assert [f["gradients"] for f in found] == [2 * n, 2 * n, 2 * n // 8, 2 * n // 8]
    assert [f["optimizer state"] for f in found] == [4 * n, *[12 * n // 8] * 3]
    assert [f["DDP buckets"] for f in found] == [2 * n, 0, 0, 0]
    assert found[3]["gathered weights"] == 2 * n and "gathered weights" not in found[0]  # whole for sampling
    assert [f.get("reduce buckets", 0) for f in found] == [
        0,
        2 * 10**9,
        2 * 10**9,
        10**9,
    ]  # 5e8 numbers, two where they overlap
    assert [f.get("fp32 gradients", 0) for f in found] == [0, *[4 * n // 8] * 3]
    assert found[3]["live weights"] == 2 * 10**9 and found[2]["live weights"] == 0
    offloaded = estimate(SEVEN, world=8, zero_stage=2, offload=True, **BIG)
    assert offloaded.items["optimizer state"] == offloaded.items["gradients"] == offloaded.items["fp32 gradients"] == 0
    assert (
        offloaded.host["offloaded optimizer state"] == 12 * n // 8
        and offloaded.host["offloaded gradients"] == 6 * n // 8
    )


def test_stage_3_keeps_its_gradients_and_buckets_while_sampling():
    small, run = config(), {**RUN, "world": 2}
    n = sizes(small).parameters
    found = {stage: estimate(small, zero_stage=stage, **run) for stage in (2, 3)}
    assert (
        found[3].items["live weights"] == 4 * n and found[3].items["reduce buckets"] == 4 * n
    )  # what a CPU touches of them
    for stage, kept in ((2, 0), (3, 2 * n + 4 * n)):
        always = sum(found[stage].items[name] for name in ("framework", "weights", "optimizer state", "rollout buffer"))
        rest = found[stage].phases["rollout"] - always - found[stage].items["allocator, rollout"]
        sampling = sum(found[stage].items[name] for name in ("KV cache", "sampling", "gathered weights"))
        assert rest == sampling + kept
        copies = (1 if stage == 2 else 2) * 4 * n  # gloo makes one of its own
        items, live = found[stage].items, 4 * n * (stage == 3)
        held = always + items["gradients"] + 4 * n + copies + live
        assert items["allocator, reduction"] == (held - items["framework"]) // 4 + live
        assert found[stage].phases["reduction"] == held + items["allocator, reduction"]
    assert "reduction" not in estimate(small, **run).phases
    gpu = estimate(SEVEN, world=8, zero_stage=2, **BIG)
    buckets = 3 * 2 * 5 * 10**8  # two that overlap, and what is sent
    names = (
        "framework",
        "weights",
        "optimizer state",
        "rollout buffer",
        "activations",
        "loss",
        "accumulated gradients",
    )
    assert gpu.phases["forward/backward"] == buckets + sum(gpu.items[name] for name in names)
    offloaded = estimate(small, zero_stage=3, offload=True, **run)
    assert offloaded.items["gradients"] == 4 * n and offloaded.items["optimizer state"] == 6 * n and not offloaded.host


def test_keys_and_values():
    assert kv_cache_bytes(sizes(SEVEN), 1000, 2) == 2 * 28 * 4 * 128 * 2 * 1000
    rows = estimate(SEVEN, sequences=128, **BIG).items["KV cache"]
    assert rows == 2 * 28 * 4 * 128 * 2 * 128 * 2560
    assert estimate(SEVEN, rollout="vllm_server", **BIG).items["KV cache"] == 0


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_adapters_are_those_of_peft(targets):
    by_hand = {  # r (in + out) for each of two layers
        "all-linear": 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)),
        "q_proj v_proj": 2 * 4 * ((64 + 64) + (64 + 32)),
        "down_proj": 2 * 4 * (64 + 160),
    }
    model = AutoModelForCausalLM.from_config(config())
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    expected = peft.get_nb_trainable_parameters()[0]
    assert lora_parameters(config(), 4, targets)[0] == expected
    assert expected == by_hand[targets if isinstance(targets, str) else " ".join(targets)]


def test_sampling_holds_a_prefill_or_the_logits_of_a_step():
    long, short = ({**RUN, "prompt_tokens": n, "completion_tokens": 16, "sequences": 64} for n in (512, 1))
    hf, native = (estimate(config(), rollout=r, **long).items["sampling"] for r in ("hf", "native"))
    joined = 2 * 4 * 64 * (64 + 64 + 2 * 160)  # copies of q, k, v and gate, up
    assert hf == 64 * 512 * 4 * (3 * 160 + 4 * 64) and native - joined == 8 * 512 * 4 * (4 * 160 + 8 * 64)
    hf, native = (estimate(config(), rollout=r, **short).items["sampling"] for r in ("hf", "native"))
    assert hf == 64 * 100 * 16 + 2 * 32 * 4 * 64 * 17 and native - joined == 64 * 100 * 24
    assert estimate(config(), rollout="native", lora_rank=4, **short).items["sampling"] == 64 * 100 * 24


def test_only_adapters_have_gradients_and_state():
    n, _ = lora_parameters(config(), 4)
    items = estimate(config(), lora_rank=4, **RUN).items
    assert (items["adapters"], items["gradients"], items["optimizer state"]) == (4 * n, 4 * n, 8 * n)
    assert estimate(config(), lora_rank=4, beta=0.1, full_kl=True, **RUN).items["reference weights"] == 0
    whole = sizes(config()).parameters
    assert estimate(config(), beta=0.1, full_kl=True, **RUN).items["reference weights"] == 2 * 4 * whole


@pytest.mark.parametrize("cls", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "lora", "padded"])
def test_a_layer_keeps_what_autograd_keeps(cls, attention, kind):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    rank, padded = 4 if kind == "lora" else 0, kind == "padded"
    found = [saved_bytes(cls, layers, attention, dtype, rank, padded) for layers in (1, 2)]
    changes = {"head_dim": 16} if cls is Qwen3Config else {}
    expected = activation_bytes(
        sizes(config(cls, **changes)),
        48,
        dtype.itemsize,
        dtype.itemsize,
        attention=attention,
        padded=padded,
        lora_rank=rank,
    )
    assert found[1] - found[0] == 2 * 48 * expected


@pytest.mark.parametrize("cls", [Qwen2Config, Qwen3Config])
def test_a_layer_under_autocast(cls):
    """fp32 weights: the copies that autocast keeps of them are counted with the activations of the whole model."""
    found = [saved_bytes(cls, n, "sdpa", torch.float32, 0, False, autocast=True) for n in (1, 2)]
    changes = {"head_dim": 16} if cls is Qwen3Config else {}
    size = sizes(config(cls, **changes))
    copies = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert found[1] - found[0] == 2 * 48 * activation_bytes(size, 48, 4, 2, padded=False) + copies
    half = [saved_bytes(cls, n, "sdpa", torch.bfloat16, 0, False, autocast=True) for n in (1, 2)]
    assert half[1] - half[0] == 2 * 48 * activation_bytes(size, 48, 2, 2, padded=False)


def saved_bytes(cls, layers, attention, dtype, rank, padded, autocast=False):
    """Storage that autograd keeps of the forward of 2 x 48 tokens, without the parameters."""
    changes = {"head_dim": 16} if cls is Qwen3Config else {}
    small = config(cls, num_hidden_layers=layers, attn_implementation=attention, **changes)
    model = body = AutoModelForCausalLM.from_config(small).to(dtype).train()
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, :5] = 0 if padded else 1
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        body.model(input_ids=torch.ones(2, 48, dtype=torch.long), attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_checkpointing_keeps_the_input_of_every_layer_and_one_layer():
    more, less = (estimate(SEVEN, checkpointing=c, **BIG).items["activations"] for c in (False, True))
    layer = (more - less + 28 * 8 * 2560 * 3584 * 2) // 27
    assert layer == 8 * 2560 * activation_bytes(sizes(SEVEN), 2560, 2, 2)


def test_the_loss_never_holds_the_logits():
    found = estimate(config(vocab_size=200_000), **{**RUN, "completion_tokens": 4096}).items["loss"]
    gradient, logits = 200_000 * 64 * 4, 4 * 4 * 4096 * 200_000
    assert found - gradient < 0.02 * logits


def test_the_full_kl_has_tiles_of_bounded_size():
    wide, gradient = config(vocab_size=20_000), 20_000 * 64 * 4
    few, many = (
        estimate(wide, **{**RUN, "completion_tokens": n}, full_kl=True).items["loss"] - gradient for n in (128, 8192)
    )
    assert few == 8 * 4 * (4 * 128) * 20_000  # fewer tokens than a tile has
    assert many == 8 * (64 << 20)


def test_the_heap_of_a_cpu_is_counted_and_that_of_a_gpu_is_not():
    full, adapters = estimate(config(), **RUN), estimate(config(), lora_rank=4, checkpointing=True, **RUN)
    tensors = full.total - full.items["framework"] - full.items["allocator, forward/backward"]
    assert full.items["allocator, forward/backward"] == int(0.25 * tensors)
    every = estimate(config(), lora_rank=4, **RUN).items["activations"]
    assert adapters.items["allocator, forward/backward"] == every > adapters.items["activations"]
    assert not any("allocator" in name for name in estimate(SEVEN, **BIG).items)


def test_the_peak_is_the_largest_moment():
    long = estimate(config(), **{**RUN, "completion_tokens": 4000})
    assert long.peak_phase == "forward/backward" and long.total == max(long.phases.values())
    many = estimate(config(), rollout="native", sequences=4000, **RUN)
    assert many.peak_phase == "rollout" and many.items["activations"] > 0


def test_lines_start_with_the_largest_and_add_up():
    lines = estimate(SEVEN, machine=gpu(80), **BIG).lines()
    peak = next(i for i, line in enumerate(lines) if line.startswith("peak"))
    sizes_of = [float(line.split(" GiB")[0].split()[-1]) for line in lines[: peak + 1]]
    assert sizes_of[:-1] == sorted(sizes_of[:-1], reverse=True)
    assert sum(sizes_of[:-1]) == pytest.approx(sizes_of[-1], abs=0.1) and "%" in lines[0]
    assert "unknown" in estimate(SEVEN, **BIG).lines()[-4] or any(
        "unknown" in x for x in estimate(SEVEN, **BIG).lines()
    )


def test_quantised_weights_are_those_of_the_linear_layers_but_the_head():
    size = sizes(SEVEN)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944  # q and o, k and v, the MLP
    assert size.linear == 28 * layer
    bits = quantized_bits({"load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    assert bits == pytest.approx(4.127, abs=1e-3)  # QLoRA, arXiv:2305.14314, section 3: 0.127 bits for the scales
    assert quantized_bits({"load_in_4bit": True}) == 4.5 and quantized_bits({"load_in_8bit": True}) == 8
    assert quantized_bits(None) == 0
    found = estimate(SEVEN, **BIG, lora_rank=16, linear_bits=bits)
    plain = estimate(SEVEN, **BIG, lora_rank=16)
    assert found.items["weights"] == 2 * (size.parameters - size.linear) + int(size.linear * bits / 8)
    assert found.items["a dequantised layer"] == 2 * 3584 * 18944
    assert 2 * found.items["adapters"] == plain.items["adapters"]  # bf16 over quantised weights
    assert 2 * found.items["optimizer state"] == plain.items["optimizer state"]
    assert plain.items["a dequantised layer"] == 0


def test_qlora_is_advised_where_lora_does_not_suffice():
    run = dict(BIG, micro_batch=1, sequences=16, completion_tokens=256, group=8, lora_rank=16, checkpointing=True)
    found = estimate(SEVEN, **run, machine=gpu(16))
    assert not found.fits() and found.advice().startswith("peft=qlora: ")
    on_cpu = estimate(SEVEN, **dict(run, device="cpu", autocast=False), machine=gpu(16))
    assert "qlora" not in on_cpu.advice()


def test_advice_names_the_first_setting_that_makes_it_fit():
    base = {**BIG, "sequences": 128}
    assert estimate(config(), machine=gpu(80), **base).advice().startswith("It fits")
    half = Qwen2Config(**{**SEVEN.to_dict(), "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864})
    assert estimate(half, machine=gpu(24), **base).advice().startswith("trainer.activation_checkpointing=true: ")
    assert "does not suffice alone" in estimate(SEVEN, machine=gpu(8), checkpointing=True, **base).advice()
    eager = estimate(half, machine=gpu(20), attention="eager", checkpointing=True, **base)
    assert eager.advice().startswith("model.attn_implementation=sdpa")
    colocate = {"rollout": "vllm_colocate", "vllm_gpu_memory_utilization": 0.9, "checkpointing": True}
    nothing = {
        "micro_batch": 1,
        "accumulation": 1,
        "prompt_tokens": 2048,
        "completion_tokens": 1,
        "lora_rank": 4,
        "linear_bits": 4.5,
    }
    stuck = estimate(SEVEN, machine=gpu(8), device="cuda", sequences=101, **nothing)
    assert stuck.peak_phase == "rollout" and stuck.advice().startswith("Nothing in the configuration lowers the peak")
    assert "trainer.vllm_gpu_memory_utilization=0.45" in estimate(half, machine=gpu(80), **colocate, **base).advice()


def test_advice_holds_when_followed():
    before = estimate(SEVEN, machine=gpu(80), lora_rank=16, **BIG)
    text = before.advice()
    assert text.startswith("trainer.activation_checkpointing=true")
    after = estimate(SEVEN, machine=gpu(80), lora_rank=16, checkpointing=True, **BIG)
    assert not before.fits() and after.fits() and f"to {after.total / GIB:.2f} GiB" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, "micro_batch=0 does not work"),
        ({"rollout": "vllm"}, "rollout=vllm is not known. Expected one of: hf, native"),
        ({"dtype": "auto"}, "dtype=auto"),
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"rollout": "vllm_colocate"}, "none is known"),
        ({"lora_rank": 4, "lora_targets": ["nothing"]}, "peft: r=4"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        estimate(config(), **{**RUN, **changes})


def test_a_model_that_is_no_decoder_is_refused():
    with pytest.raises(ConfigError, match="T5Config is no causal language model"):
        sizes(T5Config())


def test_the_machine_is_what_the_control_group_allows(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    write({"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 800 kB\n"})
    assert machine(tmp_path, tmp_path).ram_total == 1000 * 1024  # no control groups
    write({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max\n"})
    write({"sys/fs/cgroup/job/step/memory.current": "1\n", "sys/fs/cgroup/job/memory.max": "500000\n"})
    write({"sys/fs/cgroup/job/memory.current": "300000\n", "sys/fs/cgroup/job/memory.stat": "inactive_file 100000\n"})
    found = machine(tmp_path, tmp_path)
    assert (found.ram_total, found.ram_available) == (500_000, 300_000)  # the limit of the group above
    old = {"limit_in_bytes": "400000", "usage_in_bytes": "390000", "stat": "total_inactive_file 40000"}
    write(
        {"proc/self/cgroup": "5:memory:/\n4:cpu:/\n"} | {f"sys/fs/cgroup/memory/memory.{k}": v for k, v in old.items()}
    )
    found = machine(tmp_path, tmp_path)
    assert (found.ram_total, found.ram_available) == (400_000, 50_000) and found.disk_free > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read from /proc")
def test_the_estimate_is_within_a_quarter_of_a_real_run(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import bench_memory
    from bench_common import rounds

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)]))
    cases = {"full": {"completion_tokens": 192}, "LoRA": {"lora_rank": 8, "checkpointing": True, "rollout": "hf"}}
    work = {name: (bench_memory.measured, (bench_memory.SMALL, changes, 2, 1)) for name, changes in cases.items()}
    for name, found in rounds(work, 1).items():
        expected = bench_memory.estimated(bench_memory.SMALL, cases[name])
        assert expected["estimate_mb"] == pytest.approx(found["peak_mb"], rel=0.25), (name, expected)
