"""Activation checkpointing changes no weight, whatever is trained and however it is done."""

import pytest
import torch
import transformers.modeling_layers
from safetensors.torch import load_file

from command_line import train


def weights(tmp_path, name, *overrides):
    common = ["trainer.learning_rate=1e-3", "trainer.warmup_steps=0", "eval.before=false", "eval.after=false"]
    common.append("record.every=0")  # looks have no gradient, and checkpoint nothing
    assert train(tmp_path, *common, *overrides, name=name) == 0
    return load_file(next((tmp_path / name / "checkpoints" / "final").glob("*model.safetensors")))


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_weights_are_the_same(tmp_path, peft, monkeypatch):
    plain = weights(tmp_path, "plain", f"peft={peft}")
    layer, calls = transformers.modeling_layers.GradientCheckpointingLayer, []
    original = layer.__call__

    def watched(self, *args, **kwargs):
        calls.append(self.training and self.gradient_checkpointing)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", watched)
    for name, how in {
        "kept": [],
        "reentrant": ["trainer.activation_checkpointing_kwargs={use_reentrant: true}"],
    }.items():
        again = weights(tmp_path, name, f"peft={peft}", "trainer.activation_checkpointing=true", *how)
        assert calls and all(calls)
        assert plain.keys() == again.keys() and all(torch.equal(plain[k], again[k]) for k in plain)
