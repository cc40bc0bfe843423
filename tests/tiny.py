"""A model, data and trainers small enough for a unit test: about 30 k parameters, half a second for a few steps."""

import random

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from data import countdown
from rl.pipeline import Pipeline
from rl.trainer import EntropyTrainer


def save_model(folder, tied=True, seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(countdown.WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # far from uniform, so that entropies differ between tokens
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    countdown.tokenizer().save_pretrained(folder)
    return folder


def length_reward(prompts, completions, **columns):
    """Any reward with spread inside a group will do: it depends on the text alone."""
    return [float(len(c.split()) % 5) + 0.1 * (sum(map(ord, c)) % 7) for c in completions]


def grpo_config(folder, **changes):
    return GRPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_completion_length": 8,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "learning_rate": 0.1,
            "optim": "sgd",  # Adam would turn a gradient of 1e-9 into a full step of either sign
            "logging_steps": 1,
            "seed": 3,
            **changes,
        }
    )


def make_trainer(cls, model_folder, run_folder, plugins=None, reward=length_reward, **changes):
    """A stock GRPOTrainer, or an EntropyTrainer with ``plugins``, from the same weights, data and seed."""
    extra = {"pipeline": Pipeline(plugins or {})} if issubclass(cls, EntropyTrainer) else {}
    extra |= changes.pop("extra", {})
    data = changes.pop("data", None) or countdown.dataset("train", [3], 32, seed=0)
    torch.manual_seed(0)
    return cls(
        model=Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        reward_funcs=[reward],
        args=grpo_config(run_folder, **changes),
        train_dataset=data,
        processing_class=countdown.tokenizer(),
        **extra,
    )


def train(cls, model_folder, run_folder, plugins=None, **changes):
    """Train and return the parameters by name."""
    trainer = make_trainer(cls, model_folder, run_folder, plugins, **changes)
    random.seed(0)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(a, b):
    """Equal parameters up to rounding in fp32; a step moves them by about 0.1."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


__all__ = ["EntropyTrainer", "GRPOTrainer", "assert_same", "make_trainer", "save_model", "train"]
