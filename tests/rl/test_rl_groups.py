"""Voting without training on all votes, and rewards that know how likely a completion was."""

import pytest
import torch

from rl.errors import ConfigError
from rl.groups import only_votes, trained_of_group
from rl.plugins.fork_mask import ForkMask
from rl.rollout import NativeSampler
from tiny import EntropyTrainer, grpo_config, length_reward, make_trainer, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def rollout(trainer):
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._generate_and_score_completions(batch)


def test_the_first_of_each_group_are_trained_on():
    assert only_votes(8, 4, 3, torch.device("cpu")).tolist() == [False, False, False, True] * 2


def test_group_statistics_and_losses_see_the_trained_ones_only(model, tmp_path):
    trainer = make_trainer(EntropyTrainer, model, tmp_path, extra={"train_share": 0.5}, loss_type="dapo")
    output = rollout(trainer)
    votes = only_votes(len(output["advantages"]), 4, 2, torch.device("cpu"))
    texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
    reward = torch.tensor(length_reward([], texts))[~votes].view(-1, 2)
    expected = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(output["advantages"][~votes], expected)
    assert (output["advantages"][votes] == 0).all() and output["completion_mask"][votes].sum() == 0
    assert output["num_items_in_batch"] == output["completion_mask"].sum() > 0


def test_votes_do_not_move_the_rollouts_threshold(model, tmp_path):
    plugins = {"mask": ForkMask(scope="rollout")}
    trainer = make_trainer(EntropyTrainer, model, tmp_path, plugins, extra={"train_share": 0.5}, loss_type="dapo")
    output = rollout(trainer)
    assert torch.equal(trainer._rollout_entropy, output["old_entropy"][output["completion_mask"].bool()])
    assert 0 < len(trainer._rollout_entropy) < (output["old_entropy"] > 0).sum()


def test_training_with_votes_moves_only_by_the_trained_ones(model, tmp_path):
    """The reward of a vote may be anything."""

    def with_noise(amount):
        def reward(prompts, completions, **columns):
            values = length_reward(prompts, completions)
            return [v + amount * (i % 4 >= 2) for i, v in enumerate(values)]

        trainer = make_trainer(
            EntropyTrainer, model, tmp_path, reward=reward, extra={"train_share": 0.5}, loss_type="dapo"
        )
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(with_noise(0.0), with_noise(100.0))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("accumulation", [2, 1])  # on-policy, and off-policy where TRL scores at the rollout
def test_rewards_that_ask_get_the_mean_logp(model, tmp_path, native, accumulation):
    seen = {}

    class Likely:
        __name__ = "likely"
        needs_logp = True

        def __call__(self, prompts, completions, mean_logp, completion_ids, **columns):
            seen.update(mean=mean_logp, lengths=[len(ids) for ids in completion_ids])
            return mean_logp

    changes = {"gradient_accumulation_steps": accumulation, "steps_per_generation": 2}
    trainer = make_trainer(EntropyTrainer, model, tmp_path, reward=Likely(), **changes)
    if native:
        sampler = NativeSampler(trainer.model.config, trainer.args, rank=False)
        trainer = make_trainer(EntropyTrainer, model, tmp_path, reward=Likely(), extra={"sampler": sampler}, **changes)
    output = rollout(trainer)
    ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    logp = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -output["completion_ids"].shape[1] :]
    inside = output["completion_mask"].bool()
    assert seen["lengths"] == inside.sum(1).tolist()
    expected = (logp.where(inside, 0).sum(1) / inside.sum(1)).tolist()
    assert seen["mean"] == pytest.approx(expected, abs=1e-5) and len(set(seen["mean"])) > 2


def test_what_is_refused(tmp_path):
    assert trained_of_group(1.0, grpo_config(tmp_path)) == 4 and trained_of_group(0.5, grpo_config(tmp_path)) == 2
    for share, changes, message in (
        (5, {}, "train_share=5 is no share"),
        (None, {}, "train_share=None is no share"),
        (0.25, {}, "is 1 completions"),
        (0.6, {}, "is 2.4 completions"),
        (0.5, {"loss_type": "dr_grpo"}, "divides by trained tokens, not trainer.loss_type=dr_grpo"),
        (0.5, {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize only"),
    ):
        with pytest.raises(ConfigError, match=message):
            trained_of_group(share, grpo_config(tmp_path, **changes))
