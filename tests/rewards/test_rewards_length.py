"""overlong (DAPO eq. 13) and length_budget (RMT), by hand."""

from types import SimpleNamespace

import pytest

from rewards.errors import RewardError
from rewards.length import LengthBudget, budget, overlong


def ids(*lengths):
    return [[0] * n for n in lengths]


def scores(reward, *lengths, **columns):
    return reward(["p"] * len(lengths), [""] * len(lengths), completion_ids=ids(*lengths), **columns)


def test_overlong_of_the_paper():
    """max 20480, buffer 4096: free up to 16384, half way at 18432, -1 at the end and beyond."""
    lengths = (0, 16384, 17408, 18432, 20480, 30000)
    expected = [0, 0, -0.25, -0.5, -1, -1]
    assert scores(overlong, *lengths, max_tokens=20480, buffer=4096) == expected
    assert scores(overlong, *lengths, max_tokens=20480) == expected, "a fifth is the paper's buffer"
    assert scores(overlong, 18432, max_tokens=20480, factor=0.5) == [-0.25]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"buffer": -1}, "buffer=-1 does not work. Expected a whole number from 1, or null"),
        ({"buffer": 0}, "buffer=0"),
        ({"buffer": 2.5}, "buffer=2.5"),
        ({"buffer": 101}, "buffer=101 is more than max_tokens=100"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"factor": -1}, "factor=-1 does not work. Expected a number from 0"),
        ({"factor": float("nan")}, "factor=nan"),
    ],
)
def test_overlong_refuses(setting, message):
    with pytest.raises(RewardError, match=f"reward.overlong.fn.{message}"):
        scores(overlong, 1, **{"max_tokens": 100, **setting})


def test_the_budget_of_rmt():
    assert [budget(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [800, 534, 357, 239, 160]
    assert budget(2.0) == 160 and budget(-1.0) == 800
    assert budget(1.0, start=10, floor=5, gamma=0.2) == 5


def test_the_triangle_around_the_budget():
    reward = LengthBudget(best=2.0)
    assert scores(reward, 0, 200, 800, 1200, 1600, 5000) == [0, 0.5, 2, 1, 0, 0]


def test_the_budget_follows_the_trainer():
    series = {}
    state = SimpleNamespace(global_step=50, max_steps=100)
    assert scores(LengthBudget(), 357, 800, trainer_state=state, log_metric=series.__setitem__) == [1, 0]
    assert series == {"reward/budget": 357.0}
    assert scores(LengthBudget(), 800, trainer_state=SimpleNamespace(global_step=0, max_steps=0)) == [1]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"gamma": 2}, "gamma=2 does not work. Expected a number above 0 to 1"),
        ({"gamma": 0}, "gamma=0"),
        ({"gamma": "a"}, "gamma='a'"),
        ({"start": 0}, "start=0"),
        ({"floor": 900}, "floor=900 is more than start=800"),
        ({"best": 0}, "best=0"),
    ],
)
def test_length_budget_refuses(setting, message):
    with pytest.raises(RewardError, match=f"reward.length_budget.fn.{message}"):
        LengthBudget(**setting)
