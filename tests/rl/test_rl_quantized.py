"""Training over 4-bit weights for real, on bitsandbytes' CPU backend."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from command_line import metrics, train
from rl import build
from rl.config import compose
from rl.memory import estimate, quantized_bits
from rl.paths import find_model
from rl.rollout import draw
from rl.scoring import base_of, score, scoring

bnb = pytest.importorskip("bitsandbytes")
PATH = find_model("builtin:countdown")


def loaded(*overrides):
    return build.language_model(PATH, compose(["peft=qlora", *overrides]).model)


@pytest.fixture
def pair():
    """LoRA over 4-bit weights, and over the same weights dequantised."""
    quantised, plain = (
        loaded("model.quantization.bnb_4bit_compute_dtype=float32"),
        build.language_model(PATH, compose().model),
    )
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    models = [get_peft_model(model, lora) for model in (quantised, plain)]
    theirs = models[1].state_dict()
    models[0].load_state_dict({k: v for k, v in theirs.items() if "lora" in k}, strict=False)
    return models


def gradients(model, ids):
    model.zero_grad()
    model.train()
    with scoring(base_of(model), 1.0):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_and_samples_are_those_of_the_dequantised_weights(pair):
    ids = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second time after sampling, which must not repack the weights
        ours, theirs = (gradients(model, ids) for model in pair)
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for name, gradient in ours.items():
            assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-6), name
        for model in pair:
            model.eval()
            torch.manual_seed(0)
            prompts = [[4, 5, 6]] * 3
            drawn = draw(model, prompts, max_new_tokens=6, ends=[0], pad=0)
            whole = torch.cat([torch.tensor(prompts), drawn.ids], 1)
            mask = torch.cat([torch.ones(3, 3), drawn.mask], 1).long()
            found = score(model, whole, mask, drawn.ids.shape[1])
            assert torch.allclose(found.logp * drawn.mask, drawn.recorded.logp, atol=1e-4)


@pytest.mark.parametrize("double", [True, False])
def test_the_estimate_of_the_weights_is_what_they_take(double):
    model = loaded(f"model.quantization.bnb_4bit_use_double_quant={double}")
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():  # but for the table of 256 numbers that each layer has
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
            held += sum(scale.numel() * scale.element_size() for scale in scales)
    numbers = dict(micro_batch=1, prompt_tokens=8, completion_tokens=8, lora_rank=4)
    options = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    estimated = estimate(model.config, **numbers, linear_bits=quantized_bits(options)).items["weights"]
    assert abs(estimated - held) <= 0.002 * held


@pytest.mark.parametrize("rollout", ["native", "hf"])
def test_a_run_trains_its_adapters(tmp_path, rollout):
    options = ["peft=qlora", "peft.r=4", f"rollout={rollout}", "trainer.activation_checkpointing=true"]
    assert train(tmp_path, *options, "eval.before=false") == 0
    assert [line["step"] for line in metrics(tmp_path / "it")] == [1, 2]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "it" / "checkpoints" / "final" / "adapter_model.safetensors")
    moved = [name for name, weight in saved.items() if "lora_B" in name and weight.abs().max() > 0]
    assert moved and all(weight.dtype == torch.bfloat16 for weight in saved.values())
