"""For people who write plug-ins: a batch and a rollout from plain tensors, a readable reference loss, and the laws every plug-in obeys.

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_law(law):
        law(MyIdea)

Nothing here needs pytest: a law is a function that raises AssertionError with a sentence.
"""

from rl.testing.batch import batch_from_logits, loss_from_signal, rollout_of
from rl.testing.laws import OF_ONE_PROCESS
from rl.testing.pairs import check_pair
from rl.testing.ranks import two_ranks, two_ranks_are_one_process
from rl.testing.samples import Make, random_batch

LAWS = (*OF_ONE_PROCESS, two_ranks_are_one_process)

__all__ = [
    "LAWS",
    "Make",
    "batch_from_logits",
    "check_pair",
    "loss_from_signal",
    "random_batch",
    "rollout_of",
    "two_ranks",
    "two_ranks_are_one_process",
]
