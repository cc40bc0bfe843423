"""The unlikeliness reward (arXiv 2506.02355): golden numbers of code and paper."""

import pytest

from rewards.checked import Checked
from rewards.errors import RewardError
from rewards.unlikeliness import Unlikeliness, ranks

LOGP = [-1.2, -0.3, -0.8, -0.5]


def right(prompts, completions, **columns):
    return [float(c) for c in completions]


def test_the_factors_of_the_code_and_of_the_paper():
    assert ranks(LOGP) == [0, 3, 1, 2]
    assert Unlikeliness(right).factors(LOGP) == [1, 0.8125, 0.9375, 0.875]
    assert Unlikeliness(right, form="paper").factors(LOGP) == [0.9375, 0.75, 0.875, 0.8125]


def test_only_a_positive_reward_changes():
    scores = Unlikeliness(right)(["p"] * 4, ["1", "0", "-1", "2"], mean_logp=LOGP)
    assert scores == [1, 0, -1, 1.75]


def test_ranks_are_taken_within_each_prompt_and_ties_keep_their_order():
    prompts, logp = ["a", "b", "a", "b"], [-1.0, -9.0, -1.0, -8.0]
    assert Unlikeliness(right, group=2)(prompts, ["1"] * 4, mean_logp=logp) == [1, 1, 0.875, 0.875]


def test_a_prompt_that_occurs_twice_makes_two_groups():
    assert Unlikeliness(right, group=2)(["a"] * 4, ["1"] * 4, mean_logp=[-4.0, -3.0, -2.0, -1.0]) == [
        1,
        0.875,
        1,
        0.875,
    ]


def test_columns_reach_the_reward_that_is_changed():
    graded = Unlikeliness(lambda prompts, completions, answer, **k: [float(a) for a in answer])
    assert graded(["p"] * 2, ["x"] * 2, mean_logp=[-1.0, -2.0], answer=["1", "1"]) == [0.875, 1]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "needs mean_logp"),
        ({"mean_logp": [-1.0, float("nan"), -1.0]}, "mean_logp=nan for completion 1"),
        ({"mean_logp": [-1.0, -1.0, -1.0]}, "3 completions of one prompt, expected a multiple of 2"),
    ],
)
def test_columns_that_do_not_work(columns, message):
    with pytest.raises(RewardError, match=message):
        Unlikeliness(right, group=2)(["p"] * 3, ["1"] * 3, **columns)


@pytest.mark.parametrize("setting", [{"beta": 2}, {"beta": -0.1}, {"form": "x"}, {"group": 0}])
def test_unlikeliness_refuses(setting):
    key, value = next(iter(setting.items()))
    with pytest.raises(RewardError, match=f"reward.unlikeliness.fn.{key}={value!r}"):
        Unlikeliness(right, **setting)


def test_it_asks_the_trainer_for_logp():
    assert Checked("unlikeliness", Unlikeliness(right)).needs_logp and not Checked("right", right).needs_logp
