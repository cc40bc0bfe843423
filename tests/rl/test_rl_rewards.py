"""The rewards as a run selects them: every yaml builds and trains, gates, and what is wrong with them."""

import json

import pytest

from rl import build
from rl.cli import main
from rl.config import compose, gate_order
from rl.errors import ConfigError
from rl.paths import configs_dir
from rl.preflight.probe import probe_rewards

NAMES = sorted(p.stem for p in (configs_dir() / "reward").glob("*.yaml"))
NEEDS = {"code_exec": ["reward.code_exec.fn.enabled=true", "reward.code_exec.fn.sandbox=none"]}
ROW = {"prompt": "8 7 8 7 > 15 : ", "numbers": "8 7 8 7", "target": 15, "tests": ["assert True"]}


def rewards(*overrides):
    return build.rewards(compose(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_builds_scores_empty_completions_and_can_have_a_gate(name):
    gate = "correct" if name != "correct" else "format_tags"
    functions, _ = rewards(f"reward=[{name},{gate}]", f"reward.{name}.gate={gate}", *NEEDS.get(name, []))
    assert [f.__name__ for f in functions] == [name, gate]
    probe_rewards(functions, [ROW], 8)
    probe_rewards(functions, [{**ROW, "prompt": [{"role": "user", "content": "x"}]}], 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_reward_is_explained(name):
    lines = (configs_dir() / "reward" / f"{name}.yaml").read_text().splitlines()
    plain = ("weight:", "gate_min:", "fn:", "_target_:", "_partial_:", "group:")
    assert lines[0].startswith("# ")
    for line in lines[2:]:
        assert "#" in line or line.strip().startswith(plain), line


def test_gates_close_in_chains_whatever_the_order_of_selection():
    """a is 0, -1 for 5 and 12 tokens; b and c are 5/12, 1. b counts where a >= 0, c where b, after its own gate, >= 0.1."""
    triangle = "fn: {_target_: rewards.length.LengthBudget, start: 12, gamma: 1}"
    slope = "fn: {_target_: rewards.length.overlong, _partial_: true, max_tokens: 10, buffer: 1}"
    functions, weights = rewards(
        "~reward.correct",
        f"+reward.c={{weight: 3, gate: b, gate_min: 0.1, {triangle}}}",
        f"+reward.b={{weight: 2, gate: a, gate_min: 0, {triangle}}}",
        f"+reward.a={{weight: 1, {slope}}}",
    )
    assert [f.__name__ for f in functions] == ["c", "b", "a"] and weights == [3, 2, 1]
    completions = ["short", "long"]
    scores = [f(prompts=["p"] * 2, completions=completions, completion_ids=[[0] * 5, [0] * 12]) for f in functions]
    assert scores == [[pytest.approx(5 / 12), 0], [pytest.approx(5 / 12), 0], [0, -1]]


def test_the_order_of_building():
    gates = {"c": ("b", 0.5), "b": ("a", 0.5), "a": (None, 0.5)}
    assert gate_order(gates) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["reward.correct.gate=format_tags"],
            "reward.correct.gate=format_tags is not selected. Expected another selected",
        ),
        (
            ["reward=[correct,overlong]", "reward.correct.gate=x"],
            "gate=x is not selected. Expected one of: overlong, or null",
        ),
        (["reward.correct.gate=correct"], "reward.correct.gate=correct is the reward itself"),
        (
            ["reward=[correct,overlong]", "reward.correct.gate=overlong", "reward.overlong.gate=correct"],
            "reward.correct.gate=overlong goes in a circle: correct, overlong",
        ),
        (["reward.correct.gate_min=high"], "reward.correct.gate_min=high does not work. Expected a number"),
        (["reward.correct.gate_min=null"], "reward.correct.gate_min=None"),
        (["reward.correct.weight=much"], "reward.correct.weight=much"),
        (["+reward.correct.wieght=1"], "reward.correct.wieght is not a key of a reward. Did you mean weight?"),
        (["+reward.std={weight: 1, fn: null}"], "reward.std: the series reward/std means all rewards"),
    ],
)
def test_gates_and_weights_that_do_not_work(overrides, message):
    with pytest.raises(ConfigError) as error:
        rewards(*overrides)
    assert message in str(error.value)


def train(folder, *overrides):
    small = ["data.train.count=64", "data.heldout.count=4", "trainer.per_device_train_batch_size=64", "debug=two_steps"]
    quick = ["eval.before=false", "eval.after=false", f"run.dir={folder}", "run.name=it"]
    return main(["train", *small, *quick, *overrides])


def series(folder):
    return [json.loads(line) for line in (folder / "it" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_shaping_and_gates_logs_each_reward(tmp_path):
    names = ["correct", "overlong", "repetition", "length_budget"]
    gated = ["reward.repetition.gate=correct", "reward.length_budget.fn.start=20"]
    assert train(tmp_path, f"reward=[{','.join(names)}]", *gated) == 0
    for line in series(tmp_path):
        assert {f"reward/{name}" for name in names} <= set(line)
        assert (
            line["reward/repetition/gated"] == pytest.approx(1 - line["reward/correct"], abs=1e-6)
            and line["reward/correct"]
        )
        assert line["reward/overlong"] == -0.5, "18 tokens, 20 allowed, 4 of them the buffer"
    assert [line["reward/budget"] for line in series(tmp_path)] == [20, 8]  # floor(20 * .2 ** .5)


def test_a_gate_that_is_never_open_leaves_nothing(tmp_path):
    assert train(tmp_path, "reward=[correct,format_tags]", "reward.correct.gate=format_tags") == 0
    for line in series(tmp_path):
        assert line["reward/correct"] == 0 and line["reward/correct/gated"] == 1 and line["reward/mean"] == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["reward=[overlong]", "reward.overlong.fn.buffer=-1"], "reward.overlong.fn.buffer=-1 does not work"),
        (
            ["reward=[length_budget]", "reward.length_budget.fn.gamma=2"],
            "reward.length_budget.fn.gamma=2 does not work",
        ),
        (["reward=[code_exec]"], "Turn it on with reward.code_exec.fn.enabled=true"),
        (["reward=[code_exec]", *NEEDS["code_exec"]], "reward.code_exec found no tests in the data"),
    ],
)
def test_bad_settings_get_one_sentence_and_write_nothing(tmp_path, capsys, overrides, message):
    assert train(tmp_path / "runs", *overrides) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
