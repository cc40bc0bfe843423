"""Hydra's four traps, bad input, and that every configuration composes."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rl.config import compose, differences, plugin_names
from rl.errors import ConfigError
from rl.options import batch_algebra, check_trainer_options
from rl.paths import configs_dir

EXPERIMENTS = [
    str(p.relative_to(configs_dir() / "experiment").with_suffix(""))
    for p in sorted((configs_dir() / "experiment").rglob("*.yaml"))
]
LOCAL = {"parquet": ["data.path=x.parquet"], "jsonl": ["data.path=x.jsonl"], "local": ["model.path=x"]}


def options(group):
    return sorted(p.stem for p in (configs_dir() / group).glob("*.yaml"))


def test_the_default_is_the_laptop_run():
    cfg = compose()
    assert (cfg.model.name, cfg.data.name, list(cfg.plugin)) == ("tiny", "countdown", ["fork_mask"])
    assert cfg.trainer.per_device_train_batch_size == 256 and cfg.trainer.steps_per_generation == 1


def test_self_comes_first_so_that_an_experiments_values_win():
    defaults = yaml.safe_load((configs_dir() / "train.yaml").read_text())["defaults"]
    assert defaults[0] == "_self_"
    assert compose(["experiment=paper/steer"]).trainer.learning_rate == 1e-6


@pytest.mark.parametrize(
    "group", ["model", "data", "reward", "plugin", "peft", "engine", "logger", "eval", "record", "debug"]
)
def test_every_option_of_every_group_composes(group):
    for option in (o for o in options(group) if not o.startswith("_")):
        choice = f"{group}=[{option}]" if group in ("reward", "plugin") else f"{group}={option}"
        cfg = compose([choice, *LOCAL.get(option, [])])
        assert OmegaConf.to_container(cfg, throw_on_missing=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_batch_fits_a_node(experiment):
    for overrides in ([], ["scale=tiny"], [f"plugin=[{','.join(plugin_names())}]"]):
        cfg = compose([f"experiment={experiment}", *overrides])
        check_trainer_options(cfg.trainer)
        batch_algebra(cfg.trainer, world=1)
        batch_algebra(cfg.trainer, world=8)


def test_scale_tiny_keeps_the_method_and_brings_the_laptop():
    """Everything but the method's own choices is what the default run has."""
    method = {"epsilon", "epsilon_high", "delta", "temperature", "top_p", "loss_type", "beta", "lr_scheduler_type"}
    default = compose().trainer
    for experiment in EXPERIMENTS:
        small, full = compose([f"experiment={experiment}", "scale=tiny"]), compose([f"experiment={experiment}"])
        assert (small.model, small.data.name) == (compose().model, "countdown")
        assert small.plugin.keys() == full.plugin.keys() and small.reward.keys() == full.reward.keys()
        changed = {k for k in small.trainer if small.trainer[k] != default.get(k)}
        assert changed <= method, changed


def test_a_real_model_on_the_command_line_does_not_get_the_laptops_values():
    cfg = compose(["model=qwen2.5_0.5b", "data=gsm8k"])
    assert (
        cfg.trainer.learning_rate == 1e-6 and cfg.trainer.max_completion_length == 2048 and cfg.engine.threads is None
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["plugin=[fork_maks]"],
            r"plugin=fork_maks does not exist. Did you mean fork_mask\? Expected one of: ares, .*entropy_band",
        ),
        (["model=gpt5"], "model=gpt5 does not exist. .*qwen"),
        (
            ["plugin.fork_mask.rh=0.1"],
            r"plugin.fork_mask.rh is not a key of the configuration. Did you mean plugin.fork_mask.rho\?",
        ),
        (["rum.name=x"], r"rum.name is not a key .* Did you mean run.name\?"),
        (["plugin.steer.w_min=0.5"], "plug-in steer is not selected. Select it, plugin=.fork_mask,steer."),
        (["plugin.stear.w_min=0.5"], r"plugin.stear does not exist. Did you mean steer\?"),
        (
            ["experiment=paper/steer", "plugin=[]"],
            "plugin.steer has settings .w_min, mapping, form. but is not selected",
        ),
        (["experiment=paper/steer", "plugin=[fork_mask]"], "plugin.steer has settings"),
        (["peft=null"], "peft=null takes no choice. Expected one of: lora, none, qlora"),
        (["plugin=[steer]", "plugin.steer=null"], "plugin.steer=null does not take a plug-in away.*~plugin.steer"),
        (["+plugin=steer", "+plugin=rank_shaping"], r"Several plugin= choices.*plugin=\[a,b\]"),
        (["data=parquet"], "data.path is not set. Give it on the command line: data.path="),
        (["trainer.max_steps"], "trainer.max_steps"),
        (["run={"], "'run={' cannot be read as an override"),
    ],
)
def test_bad_overrides_get_one_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        compose(overrides)
    assert "\n" not in str(error.value)


def test_taking_a_plugin_away_and_adding_one():
    assert list(compose(["plugin=[]"]).plugin) == []
    assert list(compose(["plugin=[steer,fork_mask]"]).plugin) == ["steer", "fork_mask"]  # the order given
    assert list(compose(["experiment=paper/steer", "~plugin.steer", "+plugin=fork_mask"]).plugin) == ["fork_mask"]


def test_any_option_of_trl_can_be_set_and_no_other():
    cfg = compose(["trainer.delta=4.0"])
    check_trainer_options(cfg.trainer)
    assert cfg.trainer.delta == 4.0
    with pytest.raises(
        ConfigError, match=r"trainer.learnin_rate is no option of trl.GRPOConfig. Did you mean learning_rate\?"
    ):
        check_trainer_options(compose(["trainer.learnin_rate=1"]).trainer)
    with pytest.raises(ConfigError, match="plugin.fork_mask.rho"):
        check_trainer_options(compose(["trainer.top_entropy_quantile=0.2"]).trainer)


def test_a_private_plugin_folder(tmp_path):
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "my_idea.yaml").write_text("my_idea: {_target_: my_lab.MyIdea, strength: 2}\n")
    cfg = compose(["plugin=[my_idea,fork_mask]", "plugin.my_idea.strength=3"], config_dir=str(tmp_path))
    assert cfg.plugin.my_idea.strength == 3
    with pytest.raises(ConfigError, match="is no folder"):
        compose([], config_dir=str(tmp_path / "nothing"))


def test_differences_are_what_an_experiment_changes():
    changed = differences(compose(["plugin.fork_mask.rho=0.5"]), compose())
    assert changed == {"plugin.fork_mask.rho": (0.2, 0.5)}
    assert differences(compose(["plugin=[]"]), compose())["plugin.fork_mask.rho"] == (0.2, None)
    assert differences(compose(), compose()) == {}


def test_batch_algebra():
    trainer = compose().trainer
    assert batch_algebra(trainer, 1).describe() == "32 prompts x 8 completions a rollout, 1 update from it, on-policy"
    off = compose(["trainer.steps_per_generation=4", "trainer.num_iterations=2"]).trainer
    assert not batch_algebra(off, 1).on_policy and "8 updates" in batch_algebra(off, 1).describe()
    with pytest.raises(
        ConfigError, match="3 completions a rollout = 3 per device x 1 devices x 1 .* not a multiple of 8"
    ):
        batch_algebra(compose(["trainer.per_device_train_batch_size=3"]).trainer, 1)
    with pytest.raises(ConfigError, match="nothing to compare"):
        batch_algebra(compose(["trainer.num_generations=1"]).trainer, 1)


def test_plugins_have_a_file_a_yaml_and_a_test_each():
    root = Path(__file__).parents[2]
    names = set(plugin_names())
    assert names == {p.stem for p in (root / "rl" / "plugins").glob("*.py")} - {
        "__init__",
        "checks",
        "steps",
        "windows",
    }
    assert names == {p.stem.removeprefix("test_") for p in (root / "tests" / "plugins").glob("test_*.py")}
