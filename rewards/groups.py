"""Which completions of one call belong to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.errors import RewardError


def groups_of(prompts: Sequence, size: int | None, who: str) -> list[list[int]]:
    """The indices of each prompt's completions, in the order in which prompts and completions appear.

    Args:
        size: completions a prompt must have. A prompt that the data set holds twice makes two groups. None: all the
            completions of a prompt are one group.
        who: the reward that asks, for the error.

    Raises:
        RewardError: a number of completions that is not a multiple of ``size``: the group is split over ranks or calls.
    """
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(str(prompt), []).append(i)
    if size is None:
        return list(found.values())
    if split := next((members for members in found.values() if len(members) % size), None):
        raise RewardError(
            f"{who} got {len(split)} completions of one prompt, expected a multiple of {size}: the group "
            "is split over ranks. Make trainer.per_device_train_batch_size * steps_per_generation a multiple of "
            "trainer.num_generations."
        )
    return [members[i : i + size] for members in found.values() for i in range(0, len(members), size)]
