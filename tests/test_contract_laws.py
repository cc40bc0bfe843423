"""The laws every plug-in obeys, run over every file in configs/plugin/ in its default and its other modes."""

import importlib
import re
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
import yaml

from rl.errors import ConfigError
from rl.explain.methods import order
from rl.pipeline import Pipeline
from rl.testing import LAWS, check_pair, two_ranks_are_one_process
from rl.testing.laws import is_the_identity_at_neutral
from rl.testing.ranks import check_ranks, on_two_ranks
from rl.testing.samples import of_tokens, random_batch, through

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


# ---- two plug-ins --------------------------------------------------------------------------------------------------------

NAMES = sorted(p.stem for p in PLUGINS.glob("*.yaml"))
MAKERS = {name: partial(cls, **defaults) for name in NAMES for cls, defaults in [load(name)]}


@pytest.mark.parametrize("first, second", list(permutations(NAMES, 2)))
def test_pair(first, second):
    check_pair(MAKERS[first], MAKERS[second])


def in_turn(tokens, *names):
    # of a small batch clip_cov drops one token at its default, mostly the same one whatever the advantages
    more = {"clip_cov": {"fraction": 0.3, "low": 0.1}}
    signal = through(Pipeline({name: MAKERS[name](**more.get(name, {})) for name in names}), tokens)
    penalties = {penalty.name: penalty.coef * penalty.mean(tokens.mask) for penalty in signal.penalties}
    return of_tokens(signal), signal.advantages, [penalties[name] for name in sorted(penalties)]


def composed(first, second, batches):
    """What the second sees of the first, found by running them: a word of the table in docs/composing.md."""
    words = set()
    for tokens in batches:
        (a, ours, penalties), (b, _, others) = in_turn(tokens, first, second), in_turn(tokens, second, first)
        differences = [(x - y).abs().max().item() for x, y in zip([a, *penalties], [b, *others], strict=True)]
        if max(differences) < 1e-9:
            words.add("same")
        elif torch.equal(in_turn(tokens, first)[1], tokens.advantages):
            words.add("before")
        else:
            words.add("replaces" if torch.equal(ours, in_turn(tokens, second)[1]) else "reads")
    return words.pop() if len(words) == 1 else (words - {"same"}).pop()  # a small batch may have nothing to show


def test_the_table_of_pairs_says_what_they_do():
    text = (PLUGINS.parents[1] / "docs" / "composing.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    start = next(place for place, row in enumerate(rows) if row[0].startswith("first"))
    columns = rows[start][1:]
    table = {
        (row[0], column): word
        for row in rows[start + 1 : start + 1 + len(columns)]
        for column, word in zip(columns, row[1:], strict=True)
    }
    free = set(re.findall(r"`(\w+)`", re.search(r"## Every pair\n\n(.*?) neither read", text, re.DOTALL)[1]))
    assert free | set(columns) == set(NAMES) and not free & set(columns)
    batches = [random_batch(rows=rows) for rows in (6, 60)]
    for pair in permutations(NAMES, 2):
        assert table.get(pair, "same") == composed(*pair, batches), pair


def test_explain_sees_the_order_wherever_it_matters():
    batches = [random_batch(rows=rows) for rows in (6, 60)]
    for pair in permutations(NAMES, 2):
        said = order({name: MAKERS[name]().explain() for name in pair})
        word = composed(*pair, batches)
        if set(pair) == {"era", "rank_shaping"}:  # they read each other, and what comes of it is the same by chance
            word = "reads"
        assert {"same": "does not matter", "before": " before "}.get(word, word) in said, (pair, word, said)


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
