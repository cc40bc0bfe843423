"""Values of TRL's options that TRL notices late or never."""

import pytest

from rl.build import grpo_config
from rl.config import compose
from rl.errors import ConfigError
from rl.options import check_generation, check_optimizer, trainer_flaws


def flaws(*overrides):
    return list(trainer_flaws(compose(list(overrides)).trainer))


def test_the_default_has_none():
    assert flaws() == flaws("model=qwen2.5_0.5b", "rollout=vllm_colocate") == flaws("rollout=vllm_server") == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("learning_rate=1e400", "=inf does not work. Expected a number above 0."),
        ("learning_rate=true", "=True is a bool. Expected a number."),
        ("weight_decay=-0.1", "=-0.1 does not work. Expected a number of at least 0."),
        ("warmup_steps=-1", "=-1 does not work. Expected a number of at least 0."),
        ("num_iterations=0", "=0 does not work. Expected a number above 0."),
        ("adam_beta2=2", "=2 does not work. Expected at least 0 and below 1."),
        ("adam_epsilon=0", "=0 does not work. Expected a number above 0."),
        ("max_grad_norm=-1", "=-1 does not work. Expected a number of at least 0."),
        ("max_grad_norm=null", "=None does not work. Expected a number."),
        ("max_completion_length=null", "=None does not work. Expected a number."),
        ("optim=adamw_troch", "=adamw_troch is not known. Expected one of: adamw_torch,"),
        ("lr_scheduler_type=cosin", "=cosin is not known. Expected one of: linear, cosine,"),
        ("lr_scheduler_kwargs=x", "=x is no map. Expected one, as {key: value}."),
        ("scale_rewards=groups", "=groups is not known. Expected one of: group, batch, none."),
        ("min_p=1.5", "=1.5 does not work. Expected 0 to 1."),
        ("top_k=-1", "=-1 does not work. Expected a number of at least 0."),
        ("top_k=1.5", "=1.5 does not work. Expected a whole number."),
        ("mask_truncated_completions=3", "=3 is a int. Expected true or false."),
        ("vllm_gpu_memory_utilization=1.2", "=1.2 does not work. Expected a share above 0 and below 1."),
        ("vllm_server_port=0", "=0 does not work. Expected a port from 1 to 65535."),
        ("vllm_mode=colocated", "=colocated is not known. Expected one of: colocate, server."),
        ("torch_compile_mode=fast", "=fast is not known. Expected one of: default,"),
        ("gradient_checkpointing=true", " is set by entrl itself: use its new name, trainer.activation_checkpointing."),
        ("log_level=loud", "=loud is not known. Expected one of: debug,"),
        ("dataloader_prefetch_factor=2", "=2 needs workers. Set trainer.dataloader_num_workers=1 or more."),
        ("sync_ref_model=true", "=true needs a reference model. Set trainer.beta above 0"),
        ("debug=5", "=5 is a int. Expected a text."),
        ("eval_on_start=true", " is set by entrl itself: use eval.before."),
        ("model_init_kwargs={}", " is set by entrl itself: use model.dtype,"),
    ],
)
def test_odd_values(override, message):
    (flaw,) = flaws(f"trainer.{override}")
    assert flaw.startswith(f"trainer.{override.partition('=')[0]}{message}")


@pytest.mark.parametrize(
    "override",
    ["max_grad_norm=1e400", "warmup_steps=0.1", "epsilon_high=null", "use_cpu=null", "delta=4", "min_p=null", "optim=adafactor",
     "lr_scheduler_kwargs={num_decay_steps: 3}", "vllm_importance_sampling_clip_max=null", "torch_compile_backend=inductor"],
)  # fmt: skip
def test_values_that_are_only_unusual(override):
    assert flaws(f"trainer.{override}") == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.optim=adamw_8bit"], "trainer.optim=adamw_8bit cannot be made: .*bitsandbytes"),
        (["trainer.adam_beta1=0"], "trainer.optim=adamw_torch_fused cannot be made: betas must be either both floats"),
        (["trainer.optim_args='foo=1'", "trainer.optim=adafactor"], None),
        (
            ["trainer.lr_scheduler_type=cosine_with_min_lr"],
            "trainer.lr_scheduler_type=cosine_with_min_lr cannot be made",
        ),
        (["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 1e-7}"], None),
        (
            ["trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs={num_decays: 1}"],
            "num_decays",
        ),
    ],
)
def test_the_optimizer_and_the_schedule_are_made_once_before_the_run(overrides, message, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False, raising=False)
    args = grpo_config(compose(overrides), "unused", [1.0])
    if message is None:
        check_optimizer(args)
    else:
        with pytest.raises(ConfigError, match=message):
            check_optimizer(args)


def test_what_generate_does_not_take():
    def attempt(*overrides):
        check_generation(grpo_config(compose(list(overrides)), "unused", [1.0]))

    attempt("trainer.generation_kwargs={num_beams: 1}", "trainer.cache_implementation=static")
    with pytest.raises(
        ConfigError, match=r"trainer.generation_kwargs.num_beam is no option .* Did you mean num_beams\?"
    ):
        attempt("trainer.generation_kwargs={num_beam: 1}")
    with pytest.raises(ConfigError, match="cannot be made: Invalid `cache_implementation`"):
        attempt("trainer.cache_implementation=x")
