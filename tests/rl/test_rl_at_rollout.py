"""What a plug-in notes of a prompt's completions at the rollout reaches the loss with them: shuffled, resumed, on two ranks."""

import pytest
import torch

from ranks import two_ranks
from rl.checkpoint import Checkpoints
from rl.contract import Rollout
from rl.errors import ConfigError
from rl.pipeline import Pipeline
from rl.plugins.ares import Ares
from rl.plugins.quantile_baseline import QuantileBaseline
from rl.plugins.target_entropy import TargetEntropy
from tiny import EntropyTrainer, make_trainer, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class Seen(QuantileBaseline):
    """The baseline, and what it saw: rewards and advantages of every micro-batch."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.batches = [], []

    def at_rollout(self, rollout):
        self.rollouts.append(rollout)
        return super().at_rollout(rollout)

    def __call__(self, tokens, signal):
        self.batches.append((tokens.group.tolist(), tokens.reward.clone(), tokens.noted["advantage"].clone()))
        return super().__call__(tokens, signal)


def test_each_completion_gets_the_advantage_of_its_own_group(model, tmp_path):
    """Micro-batches of 8 in which TRL has mixed the completions of four prompts."""
    seen = Seen()
    make_trainer(EntropyTrainer, model, tmp_path, {"it": seen}, max_steps=1).train()
    assert len(seen.rollouts) == 1 and len(seen.batches) == 2
    group = sum((b[0] for b in seen.batches), [])
    reward, noted = (torch.cat([b[i] for b in seen.batches]) for i in (1, 2))
    assert group != sorted(group) and len(reward) == 16
    for number in set(group):
        rows = [i for i, g in enumerate(group) if g == number]
        torch.testing.assert_close(noted[rows], seen.advantages(reward[rows][None])[0])
    assert noted.abs().sum() > 0


def test_votes_are_left_out(model, tmp_path):
    seen = Seen()
    trainer = make_trainer(
        EntropyTrainer, model, tmp_path, {"it": seen}, extra={"train_share": 0.5}, loss_type="dapo", max_steps=1
    )
    trainer.train()
    rollout = seen.rollouts[0]
    assert rollout.groups(rollout.reward).shape == (4, 2)
    noted = torch.cat([b[2] for b in seen.batches])
    assert 0 < (noted != 0).sum() <= 8


def test_training_goes_on_with_the_notes_of_a_half_used_rollout(model, tmp_path):
    def run(folder, resume=None):
        seen, checkpoints = Seen(), Checkpoints(tmp_path / folder, every=1, keep_last=None)
        twice = {"gradient_accumulation_steps": 1, "steps_per_generation": 2}
        trainer = make_trainer(
            EntropyTrainer, model, tmp_path / folder, {"it": seen}, extra={"checkpoints": checkpoints}, **twice
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole, weights = run("whole")
    again, resumed = run("again", resume=str(next((tmp_path / "whole").glob("*1"))))
    assert not again.rollouts and len(whole.batches) == 2 and len(again.batches) == 1
    assert torch.equal(again.batches[0][2], whole.batches[1][2])
    assert torch.equal(weights, resumed)


def test_a_note_of_another_shape_is_refused():
    class Groups(QuantileBaseline):
        def at_rollout(self, rollout):
            return {"advantage": self.advantages(rollout.groups(rollout.reward))}

    mask = torch.ones(4, 1).bool()
    rollout = Rollout(mask=mask, ids=mask, reward=torch.rand(4), old_entropy=None, group_size=2, trained=2)
    with pytest.raises(ConfigError, match=r"plugin.mine: .*advantage of shape \(2, 2\).*\(4,\); rollout.own"):
        Pipeline({"mine": Groups()}).at_rollout(rollout)


def halves(rank):
    """Three completions a rank of prompts with two each: the second prompt's are on both."""
    reward = torch.tensor([[1.0, 0.0, 2.0], [6.0, 4.0, 4.0]])[rank]
    mask = torch.ones(3, 1 + rank).bool()
    rollout = Rollout(mask=mask, ids=mask, reward=reward, old_entropy=None, group_size=2, trained=2)
    groups = rollout.groups(reward)
    return groups, rollout.own(groups.cumsum(1)), Pipeline({"q": QuantileBaseline()}).at_rollout(rollout)


def test_a_group_on_two_ranks_is_one_group():
    (groups, first, one), (same, second, two) = two_ranks(halves)
    assert torch.equal(groups, same) and groups.tolist() == [[1, 0], [2, 6], [4, 4]]
    assert first.tolist() + second.tolist() == [1, 1, 2, 8, 4, 8]
    expected = QuantileBaseline().advantages(groups).flatten()
    torch.testing.assert_close(torch.cat([one["plugin/q/advantage"], two["plugin/q/advantage"]]), expected)


def test_controllers_go_on_where_a_checkpoint_left_them(model, tmp_path):
    """Four updates from two rollouts, with all that moves between them; and resumed after the first."""

    def run(folder, resume=None):
        plugins = {"ares": Ares(window=1, correct_from=2.0, kl_every=1), "aim": TargetEntropy(target=3.5, delta=0.1)}
        trainer = make_trainer(
            EntropyTrainer,
            model,
            tmp_path / folder,
            plugins,
            extra={"checkpoints": Checkpoints(tmp_path / folder, every=1, keep_last=None)},
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            max_steps=4,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    again = run("again", resume=str(next((tmp_path / "whole").glob("*1"))))
    ares, aim = whole.pipeline.plugins.values()
    assert ares.threshold > 0 and len(set(ares.alpha)) > 1 and ares.kl.beta != [1.0] * 3 and aim.coef > 0.2
    first, second = (t.pipeline.state_dict() for t in (whole, again))
    assert str(first) == str(second)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
