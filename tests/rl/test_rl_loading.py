"""What is found about a model before its weights are loaded: quantisation, attention, adapters."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig

from rl.build import quantization
from rl.config import compose
from rl.errors import ConfigError
from rl.paths import configs_dir, find_model
from rl.preflight.doctor import model_config
from rl.preflight.loading import check_adapters, check_attention, check_model, check_quantization, check_rounding
from rl.preflight.report import Section


@pytest.fixture(scope="module")
def config():
    return model_config(find_model("builtin:countdown"), compose())


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("model", ["tiny", "qwen2.5_0.5b", "local"])
def test_qlora_goes_with_every_model(model):
    cfg = compose(["peft=qlora", f"model={model}", "model.path=x"])
    assert cfg.model.name == model and cfg.model.quantization.load_in_4bit and cfg.peft.r == 16
    check_quantization(cfg)
    assert compose([f"model={model}", "model.path=x"]).model.quantization is None


def test_without_bitsandbytes_qlora_is_one_sentence(monkeypatch):
    monkeypatch.setattr("rl.build.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs bitsandbytes. Run pip install "entrl\[qlora\]"'):
        quantization(compose(["peft=qlora"]).model)
    assert quantization(compose().model) is None


def test_weights_of_four_bits_are_not_trained():
    with pytest.raises(ConfigError, match="model.quantization without adapters"):
        check_quantization(compose(["peft=qlora", "peft=none", "+model.quantization.load_in_4bit=true"]))


def test_a_checkpoint_that_is_quantised_already_is_not_trained(config):
    quantised = model_config(find_model("builtin:countdown"), compose())
    quantised.quantization_config = {"bits": 4}
    section = Section("model")
    check_model(compose(["model.attn_implementation=null"]), section, quantised)
    assert "holds quantised weights, which cannot be trained" in section.errors[0]


def test_options_that_this_model_has_no_use_for(config):
    section = Section("model")
    check_model(compose(["trainer.router_aux_loss_coef=0.1"]), section, config)
    check_model(compose(["peft=lora", "trainer.sync_ref_model=true", "trainer.beta=0.1"]), section, config)
    assert [error.partition("=")[0] for error in section.errors] == [
        "trainer.router_aux_loss_coef",
        "trainer.sync_ref_model",
    ]


def test_steps_that_16_bits_would_round_away(config, gpu):
    bf16, zero2 = "model.dtype=bfloat16", ["engine=zero2", "engine.processes=1"]
    with pytest.raises(ConfigError, match=r"steps of 0.0006 would be rounded away .* Set model.dtype=float32"):
        check_rounding(compose([bf16]), config)
    for fits in ([], [bf16, "peft=lora"], [bf16, *zero2]):
        check_rounding(compose(fits), config)
    weight = torch.full((1,), 0.02, dtype=torch.bfloat16)
    assert weight + 1e-6 == weight  # what it is about


@pytest.mark.parametrize("name", sorted(p.stem for p in (configs_dir() / "model").glob("*.yaml")))
def test_every_model_says_how_it_can_be_trained(config, gpu, name):
    """Small ones wholly on one GPU, large ones with adapters."""
    large = any(size in name for size in ("7b", "8b")) and "1.7b" not in name
    check_rounding(compose([f"model={name}", "model.path=x", f"peft={'lora' if large else 'none'}"]), config)


def test_what_qlora_does_not_go_with():
    zero3 = "+engine.deepspeed={zero_optimization: {stage: 3}}"
    check_quantization(compose(["peft=qlora", zero3]))
    with pytest.raises(
        ConfigError,
        match="bnb_4bit_quant_storage=uint8 and bnb_4bit_compute_dtype=bfloat16 differ; PEFT supports ZeRO-3",
    ):
        check_quantization(compose(["peft=qlora", zero3, "model.quantization.bnb_4bit_quant_storage=uint8"]))
    check_quantization(compose(["peft=qlora", "model.quantization.bnb_4bit_quant_storage=uint8"]))
    with pytest.raises(ConfigError, match="packed 4-bit weights"):
        check_quantization(compose(["peft=qlora", "rollout=vllm_colocate"]))


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "null"])
def test_attentions_that_every_machine_has(config, name):
    check_attention(compose([f"model.attn_implementation={name}"]).model, config)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_needs_a_gpu_sixteen_bits_and_a_package(config, name, monkeypatch):
    def fails(message, *overrides):
        with pytest.raises(ConfigError, match=message):
            check_attention(compose([f"model.attn_implementation={name}", *overrides]).model, config)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fails("needs a GPU that was not found")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    fails("needs weights of 16 bits, model.dtype=float32 has not")
    fails("needs weights of 16 bits, model.dtype=float32 has not", "model.dtype=auto")  # as the embedded model is saved
    monkeypatch.setattr("rl.preflight.loading.find_spec", lambda name: None)
    package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}.get(name, "kernels")
    fails(f"needs the package {package}. Run pip install {package}", "model.dtype=bfloat16")


def test_an_attention_that_is_misspelt_or_not_the_models(config, monkeypatch):
    with pytest.raises(ConfigError, match="flash_atention_2 is not known. Expected one of: eager, sdpa"):
        check_attention(compose(["model.attn_implementation=flash_atention_2"]).model, config)
    monkeypatch.setattr("transformers.Qwen3ForCausalLM._supports_sdpa", False)
    with pytest.raises(
        ConfigError, match="attn_implementation=sdpa does not work: .* Use model.attn_implementation=eager"
    ):
        check_attention(compose(["model.attn_implementation=sdpa"]).model, config)


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "peft.r=0 does not work. Expected a whole number of at least 1"),
        ({"r": 1.5}, "peft.r=1.5"),
        ({"r": None}, "peft.r=None"),
        ({"lora_alpha": 0}, "peft.lora_alpha=0"),
        ({"lora_dropout": 1.0}, "peft.lora_dropout=1.0"),
        ({"task_type": "SEQ_CLS"}, "peft.task_type=SEQ_CLS does not work. Expected CAUSAL_LM"),
        ({"target_modules": ["nothing"]}, "peft: no adapters can be made on this model: .*nothing.* not found"),
        ({"target_modules": ["q_proj", "lm_head"]}, "holds the LM head"),
        ({"bias": "foo"}, "Requested bias: foo"),
        ({"inference_mode": True}, "leaves nothing to train"),
    ],
)
def test_adapters_that_cannot_be_made_or_trained(config, options, message):
    with pytest.raises(ConfigError, match=message):
        check_adapters(config, LoraConfig(**LORA | options))


def test_adapters_that_can(config):
    check_adapters(config, LoraConfig(**LORA, use_dora=True))
    check_adapters(config, IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="prompt tuning"):
        check_adapters(config, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
