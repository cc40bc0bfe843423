"""What a command line with choices becomes."""

import itertools

import pytest

from rl.config import Range, choices, compose, search_space
from rl.errors import ConfigError
from rl.paths import configs_dir
from rl.sweep.points import compose_all, expand, folder_name, name_points, read_request, varying_keys
from rl.sweep.search import corners, settings

NAMED = sorted(p.stem for p in (configs_dir() / "sweep").glob("*.yaml"))


def points(*words, config_dir=None):
    return expand(read_request(words, config_dir))


@pytest.mark.parametrize(
    "override, values",
    [
        ("seed=3", ["seed=3"]),
        ("seed=1,2", ["seed=1", "seed=2"]),
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("plugin=[],[fork_mask,steer]", ["plugin=[]", "plugin=[fork_mask,steer]"]),
        ("+plugin=steer,fork_mask", ["+plugin=steer", "+plugin=fork_mask"]),
        ("data.path='a,b.jsonl'", ["data.path='a,b.jsonl'"]),
        ("trainer.learning_rate=choice(1e-6,1e-5)", ["trainer.learning_rate=1e-06", "trainer.learning_rate=1e-05"]),
        ("eval.sets=[math500,aime24]", ["eval.sets=[math500,aime24]"]),
        ("~plugin.steer", ["~plugin.steer"]),
    ],
)
def test_an_override_stands_for_its_choices(override, values):
    assert choices(override) == values


def test_the_last_key_varies_fastest_as_in_hydra():
    expected = [[f"plugin={p}", f"seed={s}"] for p, s in itertools.product(("[]", "[steer]"), (1, 2))]
    assert points("plugin=[],[steer]", "seed=1,2") == expected


def test_points_are_what_hydra_itself_expands():
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = ["plugin=[],[fork_mask]", "seed=range(1,3)", "trainer.learning_rate=1e-6,1e-5", "data.prompt='a, b','c'"]
    parsed = OverridesParser.create().parse_overrides(words)
    assert points(*words) == [list(p) for batch in BasicSweeper.split_arguments(parsed, None) for p in batch]


@pytest.mark.parametrize("name", NAMED)
def test_every_point_of_every_named_sweep_composes(name):
    request = read_request([f"sweep={name}"])
    if request.search is not None:
        settings(request.search)
        assert len(corners(request.overrides, None)) > 2
        return
    found = expand(request)
    configs = compose_all(found)
    assert len(configs) == len(found) > 1
    assert len({p.folder for p in name_points(found, configs)}) == len(found)


def test_the_command_line_replaces_a_key_of_a_named_sweep_in_its_place():
    found = points("sweep=rho", "seed=7,8", "plugin.fork_mask.rho=0.3", "trainer.max_steps=5")
    assert found[1] == ["plugin=[fork_mask]", "plugin.fork_mask.rho=0.3", "seed=8", "trainer.max_steps=5"]
    assert len(found) == 2


def test_a_plugin_beside_a_named_sweeps_list_is_not_dropped_in_silence():
    with pytest.raises(ConfigError, match="takes only the first. Give one list"):
        compose_all(points("sweep=rho", "+plugin=steer"))


def test_a_named_sweep_of_ones_own(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# mine\n- plugin=[steer]\n- seed=1,2\n")
    assert points("sweep=mine", config_dir=str(tmp_path)) == [["plugin=[steer]", f"seed={n}"] for n in (1, 2)]


def test_names_say_what_varies_and_nothing_else():
    found = points("plugin=[],[fork_mask,steer]", "trainer.learning_rate=1e-6,2e-6", "trainer.max_steps=9")
    named = name_points(found, compose_all(found))
    assert [p.folder for p in named][::3] == [
        "001_plugin-none_learning_rate-1e-06",
        "004_plugin-fork_mask+steer_learning_rate-2e-06",
    ]
    assert named[0].varies == {"plugin": "[]", "learning_rate": "1e-06"} and named[0].steps == 9


def test_a_short_key_is_made_longer_where_two_would_be_the_same():
    found = points("plugin.steer.w_min=1,2", "other.w_min=1,2", "seed=1,2")
    assert varying_keys(found) == {"plugin.steer.w_min": "steer.w_min", "other.w_min": "other.w_min", "seed": "seed"}


def test_folder_names_are_short_and_safe_on_a_command_line():
    name = folder_name(12, {"model": "/a path/$(x);'y'=ü" * 20})
    assert name.startswith("012_model-") and len(name) <= 100
    assert compose([f"run.name={name}"]).run.name == name and "=" not in name


def test_all_points_that_cannot_run_are_told_with_each_reason_once():
    with pytest.raises(ConfigError) as error:
        compose_all(points("plugin=[],[fork_mask],[steer]", "plugin.fork_mask.rho=0.1,0.2"))
    lines = str(error.value).splitlines()
    assert lines[0] == "4 of 6 points cannot run; nothing was written:"
    assert len(lines) == 2 and "points 1-2, 5-6: plugin.fork_mask.rho is set, but" in lines[1]


@pytest.mark.parametrize(
    "words, said",
    [
        (["seed=1,1"], "points 1 and 2 are the same run: seed=1"),
        (["plugin.fork_mask.rho=0.2,0.20"], "points 1 and 2 are the same run"),
        (["run.dir=a,b"], "run.dir is the same for all points"),
        (["launcher=local,slurm"], "launcher is the same for all points"),
        (
            ["seed=1,2", "launcher.at_once=0"],
            "launcher.at_once=0 does not work. Expected a whole number of at least 1.",
        ),
        (["seed=1,2", "launcher.at_once=two"], "launcher.at_once=two does not work"),
        (["plugin=[nosuch],[steer]"], "point 1: plugin=nosuch does not exist"),
    ],
)
def test_points_that_make_no_sense_together(words, said):
    with pytest.raises(ConfigError, match=None) as error:
        compose_all(points(*words))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["seed=range(1,900)"],
            "this sweep has 899 points, more than sweep.limit=500. If they are meant, sweep.limit=899.",
        ),
        (["seed=1,2", "plugin=[],[steer]", "sweep.limit=3"], "2 x 2 points, more than sweep.limit=3"),
        (["seed=1,2", "sweep.limit=many"], "sweep.limit=many does not work. Expected a whole number of at least 1."),
        (["seed=1,2", "sweep.limit=0"], "sweep.limit=0 does not work"),
        (["seed=1,2", "sweep.trials=3"], "sweep.trials is for a search"),
        (["sweep.nam=x"], "sweep.nam is not a key of a sweep. Did you mean sweep.name?"),
        (["sweep=roh"], "sweep=roh does not exist. Did you mean rho?"),
        (["seed=1,2", "run.name=x"], "Name the sweep: sweep.name="),
        (["seed=1", "seed=2"], "seed is given twice: seed=1 and seed=2. Several values are one override: seed=a,b."),
        (["trainer.learning_rate=interval(0,1)"], "has no countable choices"),
        (["plugin=glob(*)"], "has no countable choices"),
        (["seed=[1,"], "cannot be read as an override"),
    ],
)
def test_requests_that_make_no_sense(words, said):
    with pytest.raises(ConfigError) as error:
        points(*words)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["seed: 1", "- 1", "- a: [", "overrides: [seed=1]"])
def test_a_file_that_is_no_sweep(tmp_path, text):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml is no"):
        points("sweep=mine", config_dir=str(tmp_path))


def test_the_limit_can_be_raised():
    assert len(points("seed=range(1,900)", "sweep.limit=899")) == 899


@pytest.mark.parametrize(
    "override, space",
    [
        ("seed=3", ["3"]),
        ("plugin=[],[steer]", ["[]", "[steer]"]),
        ("x=interval(0.1,2)", Range(0.1, 2.0, None, False)),
        ("x=tag(log,interval(1e-6,1e-3))", Range(1e-6, 1e-3, None, True)),
        ("x=int(interval(1,8))", Range(1, 8, None, False)),
        ("x=range(1,8,2)", Range(1, 7, 2, False)),
    ],
)
def test_what_a_search_may_choose_from(override, space):
    assert search_space(override) == space
    assert not isinstance(space, Range) or type(search_space(override).low) is type(space.low)


@pytest.mark.parametrize("override", ["x=interval(2,1)", "x=tag(log,interval(0,1))", "x=glob(*)", "x=[1,"])
def test_what_it_may_not(override):
    with pytest.raises(ConfigError, match="no interval|no countable|cannot be read"):
        search_space(override)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"trials": 3}, "optuna.metric is not set"),
        ({"metric": "m"}, "optuna.trials is not set"),
        ({"metric": "m", "trials": 0}, "optuna.trials=0 does not work. Expected a whole number of at least 1."),
        ({"metric": "m", "trials": 3, "sed": 1}, "optuna.sed is not known. Did you mean seed?"),
        ({"metric": "m", "trials": 3, "direction": "up"}, "optuna.direction=up is not known"),
        ("text", "optuna.metric is not set"),
    ],
)
def test_settings_of_a_search(given, said):
    with pytest.raises(ConfigError) as error:
        settings(given)
    assert said in str(error.value)
