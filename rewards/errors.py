"""The one error of this package."""


class RewardError(RuntimeError):
    """A reward function that did not do what a reward must: names the reward and the sample."""
