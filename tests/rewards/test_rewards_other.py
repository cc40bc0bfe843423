"""format_tags and the wrapper that finds a reward's mistakes."""

from functools import partial

import pytest

from rewards.checked import Checked
from rewards.errors import RewardError
from rewards.format_tags import format_tags


@pytest.mark.parametrize(
    "text, value",
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a\nb</think>\n<answer></answer> ", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><think>c</think><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
    ],
)
def test_format_tags(text, value):
    assert format_tags(["p"], [text]) == [value]
    assert format_tags(["p"], [[{"role": "assistant", "content": text}]]) == [value]


@pytest.mark.parametrize("tags", ["think", [], [1], [""]])
def test_tags_that_are_no_names(tags):
    with pytest.raises(RewardError, match="reward.format_tags.fn.tags"):
        format_tags(["p"], ["x"], tags=tags)


BAD = {
    "nan": (lambda **k: [1.0, float("nan")], "returned nan for sample 1 .*'prompt b'.*'text b'"),
    "none": (lambda **k: [None, 1.0], "returned None for sample 0 .*'prompt a'"),
    "text": (lambda **k: ["1", 1.0], "returned '1' for sample 0"),
    "count": (lambda **k: [1.0], "returned 1 values for 2 completions"),
    "scalar": (lambda **k: 0.5, "returned float for 2 completions"),
    "raises": (
        lambda completions, **k: [{"text a": 1.0}[c] for c in completions],
        "raised KeyError.*sample 1.*'text b'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_checked_names_the_reward_and_the_sample(case):
    fn, message = BAD[case]
    with pytest.raises(RewardError, match=f"reward.mine.*{message}"):
        Checked("mine", fn)(["prompt a", "prompt b"], ["text a", "text b"], answer=["1", "2"])


def test_checked_passes_good_values_and_columns():
    good = Checked("mine", lambda prompts, completions, answer, **k: [int(a) for a in answer])
    assert good(["p", "p"], ["a", "b"], answer=["1", "2"]) == [1.0, 2.0] and good.__name__ == "mine"


def test_a_column_cannot_take_the_place_of_a_setting():
    reward = Checked("format_tags", partial(format_tags, tags=["think"]))
    assert reward(["p"], ["<think></think>"]) == [1.0]
    with pytest.raises(RewardError, match="reward.format_tags.fn.tags would give way to the column tags"):
        reward(["p"], ["<think></think>"], tags=["algebra"])


def test_a_reward_of_groups_that_breaks_blames_no_single_sample():
    def of_groups(prompts, completions, **columns):
        if len(prompts) < 2:
            raise RewardError("split")
        raise KeyError("x")

    with pytest.raises(RewardError, match="raised KeyError: 'x'\\.$"):
        Checked("mine", of_groups)(["p"] * 2, ["a", "b"])


def leave(**columns):
    raise SystemExit


def test_checked_takes_arrays_and_stops_at_an_exit():
    import numpy as np

    assert Checked("mine", lambda **k: np.float32([1, 0]))(["p", "p"], ["a", "b"]) == [1.0, 0.0]
    with pytest.raises(RewardError, match="reward.mine raised SystemExit"):
        Checked("mine", leave)(["p"], ["a"])
