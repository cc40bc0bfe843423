"""format_tags, majority vote and the wrapper that finds a reward's mistakes."""

import math

import pytest

from rewards.checked import Checked
from rewards.errors import RewardError
from rewards.format_tags import format_tags
from rewards.majority import MajorityVote, majority


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


def identity(texts):
    return [text or None for text in texts]


def test_majority_vote_of_the_ttrl_example():
    """Golden 7: answers 4 5 None 4 6 5 4 4 -> label 4 with 4 votes, ratio 0.5 over all eight."""
    answers = ["4", "5", "", "4", "6", "5", "4", "4"]
    assert majority(identity(answers)) == ("4", 4)
    series = {}
    vote = MajorityVote(identity, votes=8, grader=lambda p, c, **k: [float(x == "4") for x in c])
    rewards = vote(["p"] * 8, answers, log_metric=series.__setitem__)
    assert rewards == [1, 0, 0, 1, 0, 0, 1, 1]
    assert series == {"reward/majority_ratio": 0.5, "reward/label_accuracy": 1.0}
    kept = rewards[:4]
    mean = sum(kept) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in kept) / 3)
    assert [(r - mean) / (std + 1e-6) for r in kept] == pytest.approx(
        [0.866023903787, -0.866023903787, -0.866023903787, 0.866023903787], abs=1e-9
    )


def test_groups_vote_on_their_own_ties_go_to_the_first_and_no_answer_scores_zero():
    vote = MajorityVote(identity)
    assert vote(["a", "a", "b", "b", "c", "c"], ["1", "2", "3", "3", "", ""]) == [1, 0, 1, 1, 0, 0]


def test_a_split_group_is_an_error():
    with pytest.raises(RewardError, match="split over ranks"):
        MajorityVote(identity, votes=4)(["a"] * 3, ["1"] * 3)


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
