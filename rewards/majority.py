"""Rewards without labels: agreement with the majority of a prompt's own completions (TTRL)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rewards.errors import RewardError
from rewards.groups import groups_of
from rewards.text import Completion, text_of
from rewards.values import whole


class MajorityVote:
    """1.0 for completions whose answer is the most frequent one among those of the same prompt, else 0.0.

    Texts without an answer do not vote and score 0; ties go to the answer seen first; a prompt without any answer scores 0
    throughout. Source: TTRL (arXiv 2504.16084), official code, which fails on a prompt without any answer. It votes with 64
    completions and trains on the first 32 of them; every one of the 64 gets its reward here.

    Differs from the official code: a completion agrees where its canonical answer *is* the label. The official code grades it
    against the label, so that another spelling of the same value scores 1 although it voted for itself; ``matches`` does that.

    When TRL offers ``log_metric``, two series describe the vote: ``reward/majority_ratio`` (votes for the label / all
    completions, mean over prompts) and ``reward/no_label`` (share of prompts without any answer). With ``grader`` three more
    compare it with the truth: ``reward/label_accuracy`` (share of prompts whose label is right; one without a label is wrong),
    ``reward/reward_accuracy`` (share of completions whose reward equals the true grade) and ``reward/ground_truth_ratio``
    (share of completions that are right).

    Args:
        answers: texts -> canonical answers or None. votes: completions a prompt must have in one call (the group size), so that
            a group split over ranks is an error instead of a smaller vote. grader: the true reward, for the series only; it
            grades every completion. matches: (texts, labels) -> 1.0 where the text's answer equals the label, else 0.0.
    """

    __name__ = "majority_vote"

    def __init__(
        self,
        answers: Callable[[list[str]], list[str | None]],
        votes: int | None = None,
        grader: Callable[..., list[float]] | None = None,
        matches: Callable[[list[str], list[str]], list[float]] | None = None,
    ):
        whole("reward.majority_vote.fn.votes", votes, 1, none=True)
        self.answers, self.votes, self.grader, self.matches = answers, votes, grader, matches

    def __call__(self, prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float]:
        texts = [text_of(c) for c in completions]
        answers = self.answers(texts)
        if len(answers) != len(texts):
            raise RewardError(
                f"majority_vote: answers returned {len(answers)} answers for {len(texts)} completions. "
                "Expected one each, None where there is none."
            )
        groups = groups_of(prompts, self.votes, "majority_vote")
        votes = [majority([answers[i] for i in members]) for members in groups]
        labels: list[str | None] = [None] * len(texts)
        for members, (label, _) in zip(groups, votes, strict=True):
            for i in members:
                labels[i] = label
        rewards = self._agree(texts, answers, labels)
        self._report(prompts, completions, columns, groups, answers, votes, rewards)
        return rewards

    def _agree(self, texts: list[str], answers: list[str | None], labels: list[str | None]) -> list[float]:
        rewards = [float(a is not None and a == label) for a, label in zip(answers, labels, strict=True)]
        if self.matches is None:
            return rewards
        asked = [i for i, (a, label) in enumerate(zip(answers, labels, strict=True)) if a is not None and a != label]
        found = self.matches([texts[i] for i in asked], [labels[i] for i in asked]) if asked else []
        for i, value in zip(asked, found, strict=True):
            rewards[i] = float(value)
        return rewards

    def _report(self, prompts, completions, columns, groups, answers, votes, rewards) -> None:
        log = columns.get("log_metric")
        if log is None:
            return
        log("reward/majority_ratio", _mean([count / len(m) for m, (_, count) in zip(groups, votes, strict=True)]))
        log("reward/no_label", _mean([label is None for label, _ in votes]))
        if self.grader is None:
            return
        grades = [g >= 0.5 for g in self.grader(prompts, completions, **columns)]
        right = [any(grades[i] and answers[i] == label for i in m) for m, (label, _) in zip(groups, votes, strict=True)]
        log("reward/label_accuracy", _mean(right))
        log("reward/reward_accuracy", _mean([(r >= 0.5) == g for r, g in zip(rewards, grades, strict=True)]))
        log("reward/ground_truth_ratio", _mean(grades))


def majority(answers: Sequence[str | None]) -> tuple[str | None, int]:
    """The most frequent answer and its votes; None does not vote, the first seen wins a tie; (None, 0) without a vote."""
    counts = Counter(a for a in answers if a is not None)
    return counts.most_common(1)[0] if counts else (None, 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
