"""Runs that differ in the seed, in names and in places are one method; labels say what tells methods apart."""

import pytest

from rl.report.methods import ABSENT, group
from rl.report.reading import read_run
from synthetic import write_run

FORK = {"fork_mask": {"_target_": "rl.plugins.fork_mask.ForkMask", "rho": 0.2}}
WIDE = {"fork_mask": {"_target_": "rl.plugins.fork_mask.ForkMask", "rho": 0.5}}


@pytest.fixture
def methods(tmp_path):
    def of(*settings):
        return group([read_run(write_run(tmp_path / f"run{i}", steps=1, **s)) for i, s in enumerate(settings)])

    return of


def test_runs_that_differ_in_the_seed_are_one_method(methods):
    found = methods({"seed": 3}, {"seed": 1, "config": {"logger.mode": "online", "run.group": "x"}}, {"seed": 2})
    assert [m.label for m in found] == ["plugin=none"]
    assert found[0].seeds == [1, 2, 3] and [run.name for run in found[0].runs] == ["run1", "run2", "run0"]
    assert found[0].settings == {}


def test_other_held_out_problems_are_another_method(methods):
    assert len(methods({}, {"config": {"data.heldout.seed": 5}})) == 2


def test_labels_say_what_differs_and_a_plugin_s_values_only_where_several_have_it(methods):
    assert [m.label for m in methods({}, {"plugin": FORK})] == ["plugin=none", "plugin=fork_mask"]


def test_labels_name_the_values_that_tell_variants_apart(methods):
    found = methods({}, {"plugin": FORK}, {"plugin": WIDE}, {"plugin": WIDE, "seed": 2})
    assert [m.label for m in found] == [
        "plugin=none",
        "plugin=fork_mask plugin.fork_mask.rho=0.2",
        "plugin=fork_mask plugin.fork_mask.rho=0.5",
    ]
    assert found[0].settings["plugin.fork_mask.rho"] == ABSENT and len(found[2].runs) == 2


def test_the_order_of_plugins_is_a_difference(methods):
    a, b = {"a": {"x": 1}}, {"b": {"x": 1}}
    assert [m.label for m in methods({"plugin": a | b}, {"plugin": b | a})] == ["plugin=a+b", "plugin=b+a"]


def test_of_another_data_set_the_label_has_the_name_and_the_settings_all(methods):
    found = methods({}, {"config": {"data.name": "gsm8k", "data.part": "main"}})
    assert [m.label for m in found] == ["data=countdown", "data=gsm8k"]
    assert found[1].settings == {"data.name": "gsm8k", "data.part": "main"}


def test_more_than_ten_methods_each_have_a_label_of_their_own(methods):
    found = methods(*({"config": {"trainer.learning_rate": i * 1e-4}} for i in range(1, 16)))
    assert len({m.label for m in found}) == 15 and found[1].label == "trainer.learning_rate=0.0002"


def test_a_shadow_changes_no_method(methods):
    watched = {**FORK, "steer": {"w_min": 0.5, "shadow": True}}
    acting = {"fork_mask": {**FORK["fork_mask"], "shadow": False}}
    (found,) = methods(dict(seed=1, plugin=FORK), dict(seed=2, plugin=watched), dict(seed=3, plugin=acting))
    assert found.label == "plugin=fork_mask" and found.seeds == [1, 2, 3]
