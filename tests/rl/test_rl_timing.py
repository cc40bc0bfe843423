"""Operations counted by torch, bytes on the wire by hand."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from rl.sizes import lora_parameters, sizes
from rl.timing import H100, Hardware, Work, rollout_time, step_time, training_time

SHAPE = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
CONFIG = Qwen2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
BODY = sizes(CONFIG).parameters - 2 * 300 * 128
ONES = Hardware(
    flops=1.0, memory=1.0, link=1.0, network=1.0, host=1.0, layer={"hf": 0.0, "native": 0.0, "vllm_colocate": 0.0}
)
WORK = Work(micro_batch=2, accumulation=4, prompt=16, completion=48, longest=48, checkpointing=False)


@pytest.mark.parametrize(("lora", "checkpointing"), [(0, False), (0, True), (4, False)])
def test_forward_and_backward_take_the_operations_torch_counts(lora, checkpointing):
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    extra = 0
    if lora:
        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
        extra = 6 * lora_parameters(CONFIG, lora)[0] * 8 * 64
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(8, 64, dtype=torch.long)).logits.sum().backward()
    work = replace(WORK, checkpointing=checkpointing, lora_rank=lora)
    ours = training_time(sizes(CONFIG), BODY, work, ONES)["backward"]
    head = 8 * 2 * 300 * 128  # torch's is on all 64 tokens, and its forward once
    ours += head * (64 * (2 if lora else 3) - 48 * (3 if lora else 4))
    assert ours + extra == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_old_policy_is_a_forward():
    found = training_time(sizes(CONFIG), BODY, replace(WORK, rollout="vllm_colocate"), ONES)
    attention = 4 * 3 * 128 * 64
    assert found["old_policy"] == 8 * 64 * (2 * BODY + attention) + 8 * 48 * 2 * 300 * 128
    assert training_time(sizes(CONFIG), BODY, WORK, ONES)["old_policy"] == 0


def test_decoding_reads_weights_once_a_token_and_every_rows_keys_and_values():
    one, two = (
        rollout_time(sizes(CONFIG), BODY, replace(WORK, rollout="native", accumulation=n), replace(ONES, flops=1e9))[1]
        for n in (4, 8)
    )
    row = 48 * (2 * 3 * 2 * 32 * 2 * (16 + 24) + 300 * 24)
    assert two - one == 8 * row and one - 8 * row == 48 * 2 * (BODY + 300 * 128)


def test_generate_waits_for_the_longest_and_copies_its_cache():
    work, fast = replace(WORK, longest=96), replace(ONES, flops=1e9)
    weights = 96 * 2 * (BODY + 300 * 128)
    hf = rollout_time(sizes(CONFIG), BODY, work, fast)[1] - weights
    native = rollout_time(sizes(CONFIG), BODY, replace(work, rollout="native"), fast)[1] - weights
    assert (
        hf
        == 8 * 96 * (7 * 2 * 3 * 2 * 32 * 2 * (16 + 48) + 300 * 24)
        > native
        == 8 * 48 * (2 * 3 * 2 * 32 * 2 * 40 + 300 * 24)
    )


def test_engines_send_what_they_must():
    bytes_, ring = 2 * sizes(CONFIG).parameters, 3 / 4

    def sent(stage, **changes):
        return step_time(CONFIG, replace(WORK, **changes), ONES, processes=4, zero_stage=stage)

    assert sent(0).gradients == 2 * ring * bytes_ and sent(0).gather == 0
    assert sent(2).gradients == (4 + 1) * ring * bytes_ and sent(2).gather == 0
    assert sent(3).gradients == 4 * ring * bytes_ == sent(3).gather  # small: gathered weights stay for the backward
    assert sent(3).gather_for_rollout == ring * bytes_ and sent(2).gather_for_rollout == 0
    assert sent(3, rollout="vllm_colocate").gather == (4 + 4) * ring * bytes_  # a pass for the old policy
    adapters = lora_parameters(CONFIG, 4)[0]
    assert sent(0, lora_rank=4).gradients == 2 * ring * 2 * adapters
    assert step_time(CONFIG, WORK, ONES, zero_stage=0).communication == 0


def test_large_models_are_gathered_for_the_backward_again():
    large = Qwen2Config(
        vocab_size=1000,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    found = step_time(large, WORK, H100, processes=4, zero_stage=3)
    assert sizes(large).parameters > 1e9 and found.gather == pytest.approx(2 * found.gradients)


def test_a_node_takes_what_it_lacks_over_all_its_cards():
    slow = replace(ONES, link=1e9)
    found = step_time(CONFIG, WORK, slow, processes=4, nodes=2, zero_stage=0).gradients
    assert found == 2 * 2 * sizes(CONFIG).parameters * (1 / 2) / 4


def test_shards_are_updated_by_their_owners_and_offloaded_ones_in_the_memory_of_the_node():
    n = sizes(CONFIG).parameters
    assert step_time(CONFIG, WORK, ONES, processes=4).optimizer == 7 * 2 * n
    assert step_time(CONFIG, WORK, ONES, processes=4, zero_stage=2).optimizer == 28 * n / 4
    assert step_time(CONFIG, WORK, ONES, processes=4, zero_stage=3, offload=True).optimizer == (28 + 4) * n


def test_a_server_gets_the_weights_a_tensor_at_a_time():
    fast = replace(H100, memory=1e30, network=1.0, update=0.5, layer={"vllm_server": 0.0})
    found = step_time(CONFIG, replace(WORK, rollout="vllm_server"), fast)
    assert found.sync == pytest.approx(2 * sizes(CONFIG).parameters + 3 * 12 * 0.5)
    assert found.rollout == pytest.approx(found.prefill + found.decode + found.sync) and found.total >= found.rollout
