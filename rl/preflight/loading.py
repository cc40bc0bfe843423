"""What goes wrong while a model is loaded and its adapters are made, found without its weights."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from rl import build
from rl.errors import ConfigError
from rl.preflight.report import Section
from rl.scoring import base_of
from rl.sizes import on_meta, without_zero3

_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_FLASH = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
    "flash_attention_4": ("flash-attn-4", is_flash_attn_4_available),
}


def check_model(cfg: DictConfig, section: Section, config: PretrainedConfig) -> None:
    """Note why this model cannot be loaded or adapted as ``cfg`` says."""
    section.attempt(check_attention, cfg.model, config)
    section.attempt(check_rounding, cfg, config)
    if cfg.trainer.get("router_aux_loss_coef") and not hasattr(config.get_text_config(), "output_router_logits"):
        section.error(
            f"trainer.router_aux_loss_coef={cfg.trainer.router_aux_loss_coef} is for mixtures of experts, which model.path={cfg.model.path} "
            "is not. Leave it null."
        )
    if cfg.peft and cfg.trainer.get("sync_ref_model"):
        section.error(
            "trainer.sync_ref_model=true: with adapters the reference is the model without them. Leave it false."
        )
    adapters = section.attempt(build.peft_config, cfg)
    if adapters is not None:
        section.attempt(check_adapters, config, adapters)
    elif not cfg.peft and getattr(config, "quantization_config", None):
        section.error(
            f"model.path={cfg.model.path} holds quantised weights, which cannot be trained. Use peft=lora, or the model they were "
            "made from."
        )


def check_quantization(cfg: DictConfig) -> None:
    """Raise ConfigError for quantised weights that would be trained, cannot be sharded, or cannot be sent to vLLM."""
    q = cfg.model.quantization
    if q is None:
        return
    if not cfg.peft:
        raise ConfigError(
            "model.quantization without adapters: weights of 4 bits cannot be trained. Use peft=qlora, or set model.quantization=null."
        )
    compute, storage = q.get("bnb_4bit_compute_dtype"), q.get("bnb_4bit_quant_storage")
    if zero_stage(cfg) == 3 and compute != storage:
        raise ConfigError(
            f"model.quantization.bnb_4bit_quant_storage={storage} and bnb_4bit_compute_dtype={compute} differ; PEFT supports ZeRO-3 "
            "only where they are equal. Set both to bfloat16."
        )
    if cfg.rollout.backend == "vllm":
        raise ConfigError(
            "peft=qlora and rollout.backend=vllm: TRL sends vLLM the packed 4-bit weights, which it cannot read. "
            "Use rollout=hf or native, or peft=lora."
        )


def zero_stage(cfg: DictConfig) -> int:
    """The stage of DeepSpeed's ZeRO, 0 without it."""
    return OmegaConf.select(cfg, "engine.deepspeed.zero_optimization.stage") or 0


def dtype_of(model: DictConfig, config: PretrainedConfig) -> str:
    """The dtype of the weights as they are loaded on a GPU."""
    return model.dtype if model.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")


def check_rounding(cfg: DictConfig, config: PretrainedConfig) -> None:
    """Raise ConfigError for weights of 16 bits that the optimizer steps on itself.

    A step of Adam is about the learning rate, and the next number in bf16 after a weight of 0.02 is 0.0001 away: at 1e-6 hardly a
    weight would ever change. DeepSpeed steps on an fp32 copy, and adapters are fp32.
    """
    dtype = dtype_of(cfg.model, config)
    if torch.cuda.is_available() and not cfg.peft and not cfg.engine.deepspeed and dtype in ("bfloat16", "float16"):
        raise ConfigError(
            f"model.dtype={cfg.model.dtype}: steps of {cfg.trainer.learning_rate:g} would be rounded away in weights of 16 bits. Set "
            "model.dtype=float32 (trainer.bf16 still computes in bf16), or use engine=zero2 or peft=lora, which keep what they train in fp32."
        )


def check_attention(model: DictConfig, config: PretrainedConfig) -> None:
    """Raise ConfigError for an attention that this machine or this model does not have; transformers says so after loading begins."""
    name, key = model.attn_implementation, f"model.attn_implementation={model.attn_implementation}"
    if name is None:
        return
    kernel = isinstance(name, str) and "/" in name
    if not kernel and name not in _ATTENTION:
        raise ConfigError(
            f"{key} is not known. Expected one of: {', '.join(_ATTENTION)}; a kernel of the hub, as kernels-community/flash-attn2; or null."
        )
    if kernel or name in _FLASH:
        if not torch.cuda.is_available():
            raise ConfigError(f"{key} needs a GPU that was not found. Use model.attn_implementation=sdpa.")
        dtype = dtype_of(model, config)
        if dtype not in ("bfloat16", "float16"):
            raise ConfigError(
                f"{key} needs weights of 16 bits, model.dtype={dtype} has not. Set model.dtype=bfloat16, or use "
                "model.attn_implementation=sdpa."
            )
        package, available = _FLASH.get(name, ("kernels", lambda: False))
        if find_spec("kernels") is None and not available():  # transformers takes the hub's kernel where it can
            raise ConfigError(
                f"{key} needs the package {package}. Run pip install {package}{'' if kernel else ' or kernels'}, or use "
                "model.attn_implementation=sdpa."
            )
    try:
        with torch.device("meta"), without_zero3():
            AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=config.dtype)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(
            f"{key} does not work: {_first_sentence(error)}. Use model.attn_implementation=eager."
        ) from error


def check_adapters(config: PretrainedConfig, adapters: Any) -> None:
    """Raise ConfigError for adapters that cannot be made on this model, or that would not be trained."""
    if isinstance(adapters, LoraConfig):
        _check_lora(adapters)
    try:
        with torch.device("meta"):
            model = get_peft_model(on_meta(config), adapters)
    except ConfigError:
        raise
    except Exception as error:  # peft checks little before it builds, so anything may come up
        raise ConfigError(
            f"peft: no adapters can be made on this model: {_first_sentence(error)}. Change peft."
        ) from error
    base = base_of(model)
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            "peft.target_modules holds the LM head, whose adapter would never be trained: logps come from its weight alone. "
            "Leave it out; all-linear does."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "peft leaves nothing to train. Check peft.target_modules, and leave peft.inference_mode alone."
        )


def _check_lora(lora: LoraConfig) -> None:
    rules = {
        "r": ("a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1),
        "lora_alpha": ("a number above 0", lambda x: 0 < x < math.inf),
        "lora_dropout": ("a share of at least 0 and below 1", lambda x: 0 <= x < 1),
        "task_type": ("CAUSAL_LM", lambda x: x == "CAUSAL_LM"),
    }
    for name, (expected, fits) in rules.items():
        value = getattr(lora, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or name == "task_type") or not fits(value):
            raise ConfigError(f"peft.{name}={value} does not work. Expected {expected}.")


def _first_sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.split(r"(?<=[^.]{3})\.\s|\n", text)[0].rstrip(". ")
