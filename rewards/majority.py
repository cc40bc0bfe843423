"""Rewards without labels: agreement with the majority of a prompt's own completions (TTRL)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rewards.errors import RewardError
from rewards.text import Completion, text_of


class MajorityVote:
    """1.0 for completions whose answer is the most frequent one among those of the same prompt, else 0.0.

    Texts without an answer do not vote and score 0; ties go to the answer seen first; a prompt without any answer scores 0
    throughout. Source: TTRL (arXiv 2504.16084), official code, which fails on a prompt without any answer.

    When ``grader`` is given and TRL offers ``log_metric``, two series say how good the labels are: ``reward/majority_ratio``
    (votes for the label / all completions of the prompt) and ``reward/label_accuracy`` (share of labels the grader accepts).

    Args:
        answers: texts -> canonical answers or None. votes: completions a prompt must have in one call (the group size), so that
            a group split over ranks is an error instead of a smaller vote. grader: the true reward, for the series only.
    """

    __name__ = "majority_vote"

    def __init__(
        self,
        answers: Callable[[list[str]], list[str | None]],
        votes: int | None = None,
        grader: Callable[..., list[float]] | None = None,
    ):
        self.answers, self.votes, self.grader = answers, votes, grader

    def __call__(self, prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float]:
        answers = self.answers([text_of(c) for c in completions])
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(str(prompt), []).append(i)
        rewards, ratios, winners = [0.0] * len(answers), [], []
        for members in groups.values():
            if self.votes is not None and len(members) % self.votes:
                raise RewardError(
                    f"majority_vote got {len(members)} completions of one prompt, expected a multiple of {self.votes}: the group "
                    "is split over ranks. Make trainer.per_device_train_batch_size * steps_per_generation a multiple of "
                    "trainer.num_generations."
                )
            label, count = majority([answers[i] for i in members])
            ratios.append(count / len(members))
            if label is not None:
                winners.append(next(i for i in members if answers[i] == label))
                for i in members:
                    rewards[i] = float(answers[i] == label)
        self._report(prompts, completions, columns, ratios, winners)
        return rewards

    def _report(self, prompts, completions, columns, ratios: list[float], winners: list[int]) -> None:
        log = columns.get("log_metric")
        if log is None or self.grader is None:
            return
        log("reward/majority_ratio", sum(ratios) / len(ratios))
        if winners:
            chosen = {k: [v[i] for i in winners] for k, v in columns.items() if isinstance(v, list)}
            grades = self.grader([prompts[i] for i in winners], [completions[i] for i in winners], **chosen)
            log("reward/label_accuracy", sum(g >= 0.5 for g in grades) / len(ratios))


def majority(answers: Sequence[str | None]) -> tuple[str | None, int]:
    """The most frequent answer and its votes; None does not vote, the first seen wins a tie; (None, 0) without a vote."""
    counts = Counter(a for a in answers if a is not None)
    return counts.most_common(1)[0] if counts else (None, 0)
