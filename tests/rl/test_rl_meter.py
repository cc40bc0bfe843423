"""A step's series: sums and counts over micro-batches and ranks, whatever each of them has seen."""

import math

import pytest
import torch
from trl import GRPOConfig

from ranks import two_ranks
from rl.contract import Mean
from rl.meter import Meter, distinct_answers, policy_means, reward_means, sampling_means

CPU = torch.device("cpu")


def mean(total, count):
    return Mean(torch.tensor(float(total)), torch.tensor(float(count)))


def values(means):
    return {name: (m.total / m.count).item() for name, m in means.items() if m.count > 0}


def means_of(meter):
    return {name: value for name, value in meter.flush().items() if not name.startswith(("time/", "mem/"))}


def test_micro_batches_of_unequal_counts_add_up_and_a_mean_of_nothing_is_left_out():
    meter = Meter(CPU)
    meter.add({"a": mean(1, 1), "b": mean(0, 0)})
    meter.add({"a": mean(0, 3)})
    assert means_of(meter) == {"a": 0.25}
    assert means_of(meter) == {}


def _names_of_their_own(rank):
    meter = Meter(CPU)
    meter.add([{"both": mean(1, 1), "a": mean(2, 1)}, {"both": mean(0, 3), "zä": mean(3, 1)}][rank])
    first = means_of(meter)
    if rank:
        meter.add({"only the second": mean(1, 2)})
    return first, means_of(meter), means_of(meter)


def test_ranks_with_other_names_or_none_neither_hang_nor_mix_them_up():
    one, two = two_ranks(_names_of_their_own)
    assert one == two == ({"both": 0.25, "a": 2.0, "zä": 3.0}, {"only the second": 0.5}, {})


def _clock(rank):
    meter = Meter(CPU)
    meter._since -= 10.0 * (1 + rank)  # began earlier
    meter.add_rollout(1.0 + rank, 30.0 + 30.0 * rank)
    return meter.flush(), meter.tokens_per_second()


def test_seconds_are_those_of_the_slowest_rank_and_tokens_everyones():
    for times, total in two_ranks(_clock):
        assert times["time/rollout"] == 2.0 and 20 <= times["time/step"] < 300
        assert times["time/tokens_per_second"] == pytest.approx(90 / times["time/step"])
        assert total == pytest.approx({"rollout": 45.0, "train": 90 / times["time/step"]})


def _distinct(rank):
    groups, answers = [[0, 0, 1], [1, 2, 2]][rank], [["7", None, "7"], ["7", "None", "8"]][rank]
    meter = Meter(CPU)
    meter.add(distinct_answers(torch.tensor(groups), answers))
    return means_of(meter)["rollout/distinct_answers"]


def test_a_group_on_two_ranks_counts_once():
    """Group 0 has 7 and no answer, group 1 twice 7, group 2 the text None and 8."""
    assert two_ranks(_distinct) == [pytest.approx(5 / 3)] * 2
    alone = distinct_answers(torch.tensor([0, 0, 1, 1, 2, 2]), ["7", None, "7", "7", "None", "8"])
    assert values(alone) == {"rollout/distinct_answers": pytest.approx(5 / 3)}


def policy(tmp_path, old_ratio, advantages, ref=None, mask=None, **changes):
    ratio = torch.tensor(old_ratio)
    logp, mask = torch.full_like(ratio, -1.0), torch.ones_like(ratio).bool() if mask is None else torch.tensor(mask)
    inputs = {"old_per_token_logps": logp - ratio.log(), "advantages": torch.tensor(advantages)}
    if ref is not None:
        inputs["ref_per_token_logps"] = torch.tensor(ref)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, epsilon=0.2, epsilon_high=0.3, **changes)
    return values(policy_means(inputs, mask, logp, mask, mask & False, args))


def test_clip_shares_are_of_the_tokens_whose_gradient_the_clip_stops(tmp_path):
    ratio = [[1.0, 1.4, 0.7, 1.25], [0.7, 0.9, 1.4, 0.5]]
    found = policy(tmp_path, ratio, [1.0, -1.0], mask=[[True] * 4, [True, True, True, False]])
    assert found["policy/clip_high"] == pytest.approx(1 / 7) and found["policy/clip_low"] == pytest.approx(1 / 7)
    assert found["compute/scored"] == 1 and found["compute/live"] == 0 and "policy/kl" not in found


def test_a_completions_ratio_is_clipped_as_a_whole_and_cispo_has_a_limit_of_its_own(tmp_path):
    ratio = [[math.exp(0.9), math.exp(-0.3)], [1.0, 1.0]]  # e^0.3 = 1.35 on average
    found = policy(tmp_path, ratio, [1.0, 1.0], importance_sampling_level="sequence")
    assert found["policy/clip_high"] == 0.5
    found = policy(tmp_path, ratio, [1.0, 1.0], loss_type="cispo")  # above 0.3, as TRL has it
    assert found["policy/clip_high"] == 1.0 and "policy/clip_low" not in found
    assert not any("clip" in name for name in policy(tmp_path, ratio, [1.0, 1.0], loss_type="sapo"))


@pytest.mark.parametrize("corrected", [True, False])
def test_kl_is_over_tokens_with_the_ratio_where_the_loss_has_it(tmp_path, corrected):
    ratio, ref = [[2.0, 1.0, 1.0]], [[-1.5, -0.5, 9.0]]
    k3 = [math.exp(d) - d - 1 for d in (-0.5, 0.5)]
    expected = (k3[0] * (2 if corrected else 1) + k3[1]) / 2
    found = policy(tmp_path, ratio, [1.0], ref, [[True, True, False]], use_bias_correction_kl=corrected)
    assert found["policy/kl"] == pytest.approx(expected, rel=1e-5)


def test_a_completion_that_a_reward_left_out_is_not_counted():
    rewards = torch.tensor([[1.0, math.nan], [0.0, 4.0], [math.nan, math.nan]])
    found = reward_means(rewards, ["a", "b"], torch.tensor([1.0, 0.5]))
    assert values(found) == {"reward/mean": 1.5, "reward/a": 0.5, "reward/b": 4.0}


def test_vllms_distance_is_over_tokens_it_could_score():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old, sampling = torch.zeros(2, 3), torch.tensor([[0.5, math.nan, 9.0], [-1.5, 9.0, 9.0]])
    output = {"old_per_token_logps": old, "sampling_per_token_logps": sampling}
    token = sampling_means({**output, "importance_sampling_ratio": torch.full((2, 3), 2.0)}, mask)
    assert values(token) == {
        "sampling/sampling_logp_difference/mean": 1.0,
        "sampling/importance_sampling_ratio/mean": 2.0,
    }
    assert token["sampling/importance_sampling_ratio/mean"].count == 3
    sequence = sampling_means({**output, "importance_sampling_ratio": torch.tensor([[1.0], [2.0]])}, mask)
    assert values(sequence)["sampling/importance_sampling_ratio/mean"] == 1.5
    assert sampling_means({"old_per_token_logps": old}, mask) == {}
