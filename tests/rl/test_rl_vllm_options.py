"""What is found about vLLM before a run folder is made; vLLM itself is not needed."""

import inspect
import socket
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from trl.import_utils import is_vllm_available

from rl.build import grpo_config
from rl.config import compose
from rl.engine import Engine
from rl.errors import ConfigError
from rl.preflight import vllm_options
from rl.preflight.report import Section
from rl.preflight.vllm_options import check_probabilities, check_version, check_vllm


def args_of(cfg):
    return grpo_config(cfg, "unused", [1.0])


def found(*overrides, processes=1):
    cfg = compose([*overrides, "trainer.bf16=false", "trainer.use_cpu=true"])  # the GPUs of the fixture are none
    section = Section("vLLM")
    check_vllm(section, cfg, args_of(cfg), Engine("ddp", processes, 1, None), launching=True)
    return section.errors


@pytest.fixture
def installed(monkeypatch):
    """A machine with vLLM 0.24 and four GPUs."""
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: object())
    versions = {"vllm": "0.24.0+cu129"}
    original = vllm_options.metadata.version
    monkeypatch.setattr(vllm_options.metadata, "version", lambda name: versions.get(name) or original(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return versions, f"trainer.vllm_server_port={port}"


@pytest.mark.parametrize("rollout", ["vllm_colocate", "vllm_server"])
@pytest.mark.parametrize(
    "override", ["trainer.top_p=0.9", "trainer.top_k=20", "trainer.min_p=0.1", "trainer.repetition_penalty=1.1",
                 "trainer.generation_kwargs={top_p: 0.9}"]
)  # fmt: skip
def test_cutting_the_distribution_would_bias_the_importance_correction(rollout, override):
    cfg = compose([f"rollout={rollout}", override])
    with pytest.raises(
        ConfigError, match=r"changes what vLLM samples from .* set trainer.vllm_importance_sampling_correction=false"
    ):
        check_probabilities(args_of(cfg))
    check_probabilities(args_of(compose([f"rollout={rollout}"])))
    check_probabilities(
        args_of(compose([f"rollout={rollout}", override, "trainer.vllm_importance_sampling_correction=false"]))
    )


@pytest.mark.parametrize(
    "version, fits", [("0.21.3", False), ("0.22.0", True), ("0.31.0+cpu", True), ("0.32.1", False)]
)
def test_the_version_is_one_that_trl_works_with(installed, version, fits):
    installed[0]["vllm"] = version
    if fits:
        check_version()
    else:
        with pytest.raises(ConfigError, match=rf"vLLM {version} is installed; TRL works with vllm<=0.31,>=0.22"):
            check_version()


def test_the_window_is_that_of_the_installed_trl():
    """TRL has no constants for it, only a warning with the two versions in it."""
    source = inspect.getsource(is_vllm_available)
    needed = next(r for r in map(Requirement, metadata.requires("entrl")) if r.name == "vllm")
    for spec in needed.specifier:
        assert f'"{spec.version}.0"' in source


def test_colocation(installed):
    assert found("rollout=vllm_colocate") == []
    assert found("rollout=vllm_colocate", "trainer.vllm_tensor_parallel_size=2", processes=4) == []
    assert (
        "=2 does not divide the 1 process of"
        in found("rollout=vllm_colocate", "trainer.vllm_tensor_parallel_size=2")[0]
    )
    assert found("rollout=hf", "trainer.top_p=0.9") == []


def test_a_server_needs_gpus_and_a_port(installed):
    server = ["rollout=vllm_server", installed[1]]
    assert found(*server, processes=3) == []
    assert "engine.processes=4 and rollout.server.gpus=1 need 5 GPUs, 4 can be seen" in found(*server, processes=4)[0]
    assert "leaves no GPU for the training" in found(*server, "rollout.server.gpus=4")[0]
    with socket.socket() as other:
        other.bind(("localhost", int(installed[1].partition("=")[2])))
        other.listen()
        assert "no server can be started there" in found(*server)[0]
        assert found(*server, "rollout.server.launch=false", processes=4) == []


def test_without_a_gpu(installed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for rollout in ("vllm_colocate", "vllm_server"):
        assert any("needs a GPU that was not found" in error for error in found(f"rollout={rollout}"))


def test_without_vllm_the_machine_is_not_judged(monkeypatch):
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: None)
    assert found("rollout=vllm_colocate") == [] and found("rollout=vllm_server", "rollout.server.gpus=9") == []
    assert "rollout.server.gpus=0" in found("rollout=vllm_server", "rollout.server.gpus=0")[0]
