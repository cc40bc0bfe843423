"""Majority vote (TTRL), by hand."""

import math

import pytest

from rewards.errors import RewardError
from rewards.majority import MajorityVote, majority


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
    assert series == {
        "reward/majority_ratio": 0.5,
        "reward/no_label": 0.0,
        "reward/label_accuracy": 1.0,
        "reward/reward_accuracy": 1.0,
        "reward/ground_truth_ratio": 0.5,
    }
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


def test_what_the_series_say():
    """Prompt a: label 1, wrong, 2 of 4 votes; b: label 3, right, 2 of 4; c: no answer at all."""
    prompts = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    answers = ["1", "1", "2", ""] + ["3", "3", "4", "5"] + [""] * 4
    truth = ["2"] * 4 + ["3"] * 4 + ["9"] * 4
    series = {}
    vote = MajorityVote(identity, 4, lambda p, c, truth, **k: [float(x == t) for x, t in zip(c, truth, strict=True)])
    rewards = vote(prompts, answers, truth=truth, log_metric=series.__setitem__)
    assert rewards == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert series == {
        "reward/majority_ratio": pytest.approx((0.5 + 0.5 + 0) / 3),
        "reward/no_label": pytest.approx(1 / 3),
        "reward/label_accuracy": pytest.approx(1 / 3),
        "reward/reward_accuracy": pytest.approx(9 / 12),  # wrong: both 1s and the 2 of prompt a
        "reward/ground_truth_ratio": pytest.approx(3 / 12),
    }


def test_without_a_grader_the_vote_is_still_described():
    series = {}
    MajorityVote(identity)(["a"] * 2, ["1", ""], log_metric=series.__setitem__)
    assert series == {"reward/majority_ratio": 0.5, "reward/no_label": 0.0}


def test_another_spelling_of_the_label_counts_when_it_is_compared():
    def equal(texts, labels):
        return [float(float(a) == float(b)) for a, b in zip(texts, labels, strict=True)]

    answers = ["0.5", "0.5", "0.50", "2", ""]
    assert MajorityVote(identity)(["p"] * 5, answers) == [1, 1, 0, 0, 0]
    assert MajorityVote(identity, matches=equal)(["p"] * 5, answers) == [1, 1, 1, 0, 0]


def test_sixty_four_vote_and_each_gets_its_reward():
    answers = ["7"] * 20 + ["8"] * 24 + [""] * 20
    assert MajorityVote(identity, votes=64)(["p"] * 64, answers) == [0] * 20 + [1] * 24 + [0] * 20


def test_a_prompt_that_occurs_twice_votes_twice():
    assert MajorityVote(identity, votes=2)(["p"] * 4, ["1", "1", "2", "2"]) == [1, 1, 1, 1]


@pytest.mark.parametrize("votes", [0, -1, "8", True])
def test_votes_that_do_not_work(votes):
    with pytest.raises(RewardError, match="reward.majority_vote.fn.votes"):
        MajorityVote(identity, votes=votes)


def test_answers_of_a_wrong_number():
    with pytest.raises(RewardError, match="answers returned 1 answers for 2 completions"):
        MajorityVote(lambda texts: texts[:1])(["p"] * 2, ["1", "2"])
