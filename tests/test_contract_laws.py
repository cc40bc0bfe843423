"""The laws every plug-in obeys, run over every file in configs/plugin/ in its default and its other modes."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import yaml

from rl.errors import ConfigError
from rl.testing import LAWS, two_ranks_are_one_process
from rl.testing.laws import is_the_identity_at_neutral
from rl.testing.ranks import check_ranks, on_two_ranks

PLUGINS = Path(__file__).parents[1] / "configs" / "plugin"

# The variants beside the defaults; a new plug-in is tested with its defaults without an entry here.
VARIANTS = {
    "ares": [{"kl_coef": 0.0}, {"alpha": 1.5, "window": 1}],
    "fork_mask": [
        {"selector": "topk"},
        {"denominator": "kept", "scope": "micro"},
        {"scope": "response"},
        {"keep": "low"},
        {"scope": "rollout"},
        {"policy": "rollout"},
        {"policy": "rollout", "scope": "response"},
        {"window": 2},
        {"window": 2, "selector": "topk", "policy": "rollout"},
    ],
    "steer": [{"mapping": "linear", "w_max": 1.2}, {"mapping": "asymmetric", "w_max": 1.3}, {"form": "theorem"}],
    "entropy_band": [{"version": "v1", "selector": "quantile"}, {"selector": "otsu_hist100"}],
    "clip_cov": [{"fraction": 0.3, "low": 0.1}, {"fraction": 0.1, "low": 0.1, "scope": "world"}],
    "kl_cov": [{"fraction": 0.3}, {"scope": "world"}],
    "era": [{"scale_advantages": False}, {"high": 1.5, "low": 1.0, "fraction": 0.5}],
    "entropy_bonus": [{"coef": -0.1}],  # with a target it does nothing before its second update: its own test
    "rank_shaping": [{"beta": 0.5}, {"beta": 0.0, "lam_head": 0.1, "lam_tail": -0.1, "k": 3}],
    "quantile_baseline": [{"form": "paper"}, {"quantile": 0.9}],
    "target_entropy": [{"target": [[0, 0.6], [9, 0.3]], "coef": -0.1, "coef_min": -1.0}],
    "w_reinforce": [{"positive": 1.0, "negative": 0.0}, {"positive": 0.0}],
}


def load(name):
    node = yaml.safe_load((PLUGINS / f"{name}.yaml").read_text())[name]
    module, _, cls = node.pop("_target_").rpartition(".")
    node = {k: v for k, v in node.items() if not (isinstance(v, str) and "${" in v)}  # interpolations have defaults
    return getattr(importlib.import_module(module), cls), node


def cases():
    for path in sorted(PLUGINS.glob("*.yaml")):
        for variant in [{}, *VARIANTS.get(path.stem, [])]:
            label = "-".join(map(str, variant.values())) or "default"
            yield pytest.param((path.stem, variant), id=f"{path.stem}-{label}")


@pytest.fixture(params=cases())
def make(request):
    name, variant = request.param
    cls, defaults = load(name)
    return partial(cls, **{**defaults, **variant})


def test_every_plugin_file_is_covered():
    assert {"fork_mask", "steer", "entropy_band", "rank_shaping"} <= {p.stem for p in PLUGINS.glob("*.yaml")}
    for path in PLUGINS.glob("*.yaml"):
        assert list(yaml.safe_load(path.read_text())) == [path.stem], f"{path.name} must define the key {path.stem}"


ONCE = (is_the_identity_at_neutral, two_ranks_are_one_process)  # these have tests of their own below


@pytest.mark.parametrize("law", [law for law in LAWS if law not in ONCE], ids=lambda law: law.__name__)
def test_law(law, make):
    law(make)


@pytest.mark.parametrize("name", sorted(p.stem for p in PLUGINS.glob("*.yaml")))
def test_identity_at_neutral(name):
    cls, defaults = load(name)
    is_the_identity_at_neutral(partial(cls, **defaults))


@pytest.mark.parametrize("name", sorted(p.stem for p in PLUGINS.glob("*.yaml")))
def test_every_shipped_method_explains_itself_with_its_numbers(name):
    cls, defaults = load(name)
    numbers = [key for key, value in defaults.items() if isinstance(value, float)]
    setting = next(key for key in ("rho", "w_min", "beta", "coef_low", *numbers) if key in defaults)
    said = cls(**{**defaults, setting: 0.37}).explain()
    shown = [*said.formula, *(f"{coef:g}" for coef, _ in said.penalties.values())]
    assert any(word in line for line in shown for word in ("0.37", "0.63"))  # 0.63: the quantile of the top 0.37


# ---- two ranks -----------------------------------------------------------------------------------------------------------


def world_cases():
    """Every plug-in in every mode, each in all scopes that do not mean one rank alone."""
    seen = []  # variants that differ in their scope only are the same here
    for param in cases():
        name, variant = param.values[0]
        cls, defaults = load(name)
        settings = {**defaults, **variant}
        for scope in ("response", "world", "rollout") if "scope" in settings else (None,):
            if scope == "response" and settings.get("denominator") == "kept":
                continue  # the kept tokens of this rank's micro-batch, by definition
            chosen = settings if scope is None else {**settings, "scope": scope}
            try:
                cls(**chosen)
            except ConfigError:  # a scope that this plug-in does not have
                continue
            if (name, chosen) not in seen:
                seen.append((name, chosen))
                yield pytest.param(name, chosen, id=f"{param.id}-{scope or 'no scope'}")


WORLD_CASES = list(world_cases())


@pytest.fixture(scope="module")
def both_ranks():
    return on_two_ranks([partial(load(name)[0], **settings) for name, settings in (p.values for p in WORLD_CASES)])


@pytest.mark.parametrize("name, settings", WORLD_CASES)
def test_two_ranks_are_one_process(both_ranks, name, settings):
    found = both_ranks[[p.values for p in WORLD_CASES].index((name, settings))]
    check_ranks(partial(load(name)[0], **settings), *found)
