"""What EntropyTrainer adds: old-policy entropies, the rollout's scope, reporting, its start-up check."""

import math

import pandas as pd
import pytest
import torch
import trl

from rl import seam
from rl.contract import Signal, TokenBatch
from rl.errors import SeamError
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.plugins.rank_shaping import RankShaping
from rl.plugins.steer import Steer
from rl.recorder import Recorder
from rl.series import of_step, rename
from tiny import EntropyTrainer, assert_same, make_trainer, save_model, train

OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class Spy:
    """Keeps every batch it sees."""

    neutral = {}

    def __init__(self, needs=(), promises=()):
        self.needs, self.promises, self.seen = frozenset(needs), frozenset(promises), []

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        self.seen.append(tokens)
        return signal


def watch(model, tmp_path, needs=(), promises=(), **changes):
    spy = Spy(needs, promises)
    trainer = make_trainer(EntropyTrainer, model, tmp_path, {"spy": spy}, **changes)
    trainer.train()
    return spy.seen, trainer


def test_on_policy_the_old_policy_is_the_current_one(model, tmp_path):
    seen, _ = watch(model, tmp_path)
    for tokens in seen:
        assert tokens.on_policy and torch.equal(tokens.logp.detach(), tokens.old_logp)
        assert torch.equal(tokens.entropy, tokens.old_entropy) and not tokens.entropy.requires_grad


def test_off_policy_the_old_entropies_belong_to_the_rollouts_policy(model, tmp_path):
    seen, _ = watch(model, tmp_path, **OFF_POLICY)
    assert not any(t.on_policy for t in seen)
    first, later = seen[0], seen[-1]
    m = first.mask
    assert torch.allclose(first.entropy[m], first.old_entropy[m], atol=1e-5)  # before the first update
    assert torch.allclose(first.logp[m], first.old_logp[m], atol=1e-5)
    assert (later.entropy - later.old_entropy)[later.mask].abs().max() > 1e-3


def test_who_promises_to_read_the_record_sees_what_the_rollout_recorded(model, tmp_path):
    seen, _ = watch(model, tmp_path, promises={"recorded"}, **OFF_POLICY)
    assert all(torch.equal(t.entropy, t.old_entropy) and torch.equal(t.logp, t.old_logp) for t in seen)


def test_needs_are_met_and_only_then(model, tmp_path):
    (plain, *_), _ = watch(model, tmp_path)
    assert plain.rank is None and plain.full_kl is None and plain.rollout_entropy is None
    everything = {"logp.grad", "entropy.grad", "rank", "full_kl", "rollout_entropy"}
    (full, *_), trainer = watch(model, tmp_path, needs=everything)
    assert not plain.logp.requires_grad and full.logp.requires_grad
    assert full.entropy.requires_grad and full.full_kl.requires_grad
    assert full.full_kl[full.mask].abs().max() < 1e-5  # the policy still is the reference
    argmax = full.rank[full.mask] == 1
    assert 0 < argmax.float().mean() < 1 and full.rank.min() >= 1
    assert (full.logp.exp()[full.mask][argmax] >= 1 / 43).all()


def test_the_rollouts_entropies_are_those_of_all_its_micro_batches(model, tmp_path):
    seen, _ = watch(model, tmp_path, needs={"rollout_entropy"}, max_steps=1)
    assert len(seen) == 2  # one rollout in two micro-batches
    pool = seen[0].rollout_entropy
    assert seen[1].rollout_entropy is pool
    values = torch.cat([t.entropy[t.mask] for t in seen])
    torch.testing.assert_close(values.sort().values, pool.sort().values, rtol=0, atol=1e-5)


def test_rewards_and_groups_travel_with_their_rows(model, tmp_path):
    seen, _ = watch(model, tmp_path)
    reward, group, advantage = (torch.cat([getattr(t, f) for t in seen[:2]]) for f in ("reward", "group", "advantages"))
    for g in group.unique():
        own = reward[group == g]
        assert len(own) == 4
        expected = (own - own.mean()) / (own.std() + 1e-4)
        torch.testing.assert_close(advantage[group == g][:, 0], expected)


@pytest.mark.parametrize("changes", [{}, OFF_POLICY], ids=["on", "off"])
@pytest.mark.parametrize(
    "plugin",
    [
        ForkMask(scope="rollout"),
        ForkMask(selector="topk", denominator="kept"),
        Steer(),
        EntropyBand(),
        EntropyBand(version="v1", selector="quantile"),
        RankShaping(lam_head=0.1, k=3),
    ],
    ids=["rollout", "topk", "steer", "band", "band_v1", "rank"],
)
def test_every_method_trains_and_changes_the_result(model, tmp_path, plugin, changes):
    plain = train(EntropyTrainer, model, tmp_path, **changes)
    acted = train(EntropyTrainer, model, tmp_path, {"it": plugin}, **changes)
    assert all(p.isfinite().all() for p in acted.values())
    assert any((plain[n] - acted[n]).abs().max() > 1e-4 for n in plain)


def test_methods_at_neutral_are_plain_grpo_up_to_rounding(model, tmp_path):
    neutral = {c.__name__: c(**c.neutral) for c in (ForkMask, Steer, EntropyBand, RankShaping)}
    assert_same(train(EntropyTrainer, model, tmp_path), train(EntropyTrainer, model, tmp_path, neutral))


def logged(model, tmp_path, plugins=None, **changes):
    lines = []
    extra = {
        "sinks": [lambda step, metrics, histograms: lines.append((step, metrics, histograms))],
        "answers": lambda texts: [t or None for t in texts],
    }
    trainer = make_trainer(EntropyTrainer, model, tmp_path, plugins, extra=extra, **changes)
    trainer.train()
    return lines


def test_series_of_a_step(model, tmp_path):
    lines = logged(model, tmp_path, {"fork_mask": ForkMask(rho=0.2), "steer": Steer()})
    assert [step for step, _, _ in lines] == [1, 2]
    for _, metrics, histograms in lines:
        expected = [
            "reward/mean",
            "reward/length_reward",
            "entropy/mean",
            "entropy/p80",
            "entropy/kept",
            "entropy/dropped",
        ]
        expected += [
            "plugin/fork_mask/touched",
            "plugin/steer/adv_mass",
            "policy/clip_low",
            "policy/lr",
            "policy/grad_norm",
        ]
        expected += [
            "rollout/len",
            "rollout/zero_std_groups",
            "rollout/distinct_answers",
            "time/step",
            "time/tokens_per_second",
        ]
        assert set(expected) <= set(metrics) and len(metrics) <= 60
        assert metrics["entropy/kept"] > metrics["entropy/mean"] > metrics["entropy/dropped"]
        assert metrics["plugin/fork_mask/kept"] == pytest.approx(0.2, abs=0.05)
        assert sum(histograms["entropy/hist"].counts) == pytest.approx(16 * metrics["rollout/len"])
        assert not any(name.startswith(("clip_ratio", "completions")) or name == "entropy" for name in metrics)


def test_an_all_truncated_batch_logs_no_entropy_instead_of_zero(model, tmp_path):
    lines = logged(model, tmp_path, mask_truncated_completions=True, max_completion_length=1)
    for _, metrics, histograms in lines:
        assert metrics["rollout/truncated"] > 0.9
        if metrics["rollout/truncated"] == 1:
            assert "entropy/mean" not in metrics and "entropy/hist" not in histograms


def test_clip_share_is_over_all_trainable_tokens_whatever_the_mask(model, tmp_path):
    """TRL's own series would see no clipped token where a plug-in made the advantage 0."""
    plain = logged(model, tmp_path, **OFF_POLICY)
    masked = logged(model, tmp_path, {"m": _Mute()}, **OFF_POLICY)
    assert sum(m["policy/clip_high"] + m["policy/clip_low"] for _, m, _ in plain) > 0
    assert all(
        m.get("policy/clip_high", 0) == 0 for _, m, _ in masked
    )  # muted: the policy never moves, nothing to clip
    assert all(m["plugin/m/touched"] == 1 for _, m, _ in masked)


class _Mute(Spy):
    def __call__(self, tokens, signal):
        return signal.drop(tokens.mask)


def test_recorded_rollouts_hold_what_each_token_was(model, tmp_path):
    recorder = Recorder(tmp_path / "rollouts", every=1, max_rows=6)
    extra = {"recorder": recorder}
    make_trainer(EntropyTrainer, model, tmp_path, {"mask": ForkMask(rho=0.3)}, extra=extra, max_steps=2).train()
    frame = pd.read_parquet(tmp_path / "rollouts" / "step_000001.parquet")
    assert len(frame) == 6 and frame["group"].is_monotonic_increasing and frame["group"].iloc[3] == 0
    for row in frame.itertuples():
        n = len(row.token_ids)
        assert n == len(row.tokens) == len(row.entropy) == len(row.logp) == len(row.kept) == len(row.weight) > 0
        assert all(shaped == (row.advantage if kept else 0) for shaped, kept in zip(row.shaped, row.kept, strict=True))
        assert max(row.logp) <= 0 and min(row.entropy) >= -1e-5
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["step_000001.parquet", "step_000002.parquet"]
    assert 2 <= len(recorder.sample(4)) <= 4


def test_adapters_train_with_a_full_kl_to_the_model_without_them(model, tmp_path):
    from peft import LoraConfig

    trainer = make_trainer(
        EntropyTrainer,
        model,
        tmp_path,
        {"band": EntropyBand(), "rank": RankShaping(lam_tail=-0.1, k=3)},
        extra={"peft_config": LoraConfig(r=2, target_modules="all-linear")},
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)


def test_rename_keeps_what_a_reward_logs_itself_and_drops_what_entrl_counts():
    logged = {"rewards/correct/mean": 1.0, "reward": 1.0, "kl": 0.1, "reward/label_accuracy": 0.5, "entropy": 0.0}
    assert rename({**logged, "completions/max_length": 7}) == {"reward/label_accuracy": 0.5, "rollout/len_max": 7.0}


def test_the_longest_of_several_rollouts_is_the_longest():
    rollouts = {
        "completions/max_length": [7.0, 3.0],
        "completions/mean_length": [2.0, 3.0],
        "reward/x": [math.nan, 1.0],
    }
    assert of_step({**rollouts, "nothing": [math.nan]}) == {
        "completions/max_length": 7.0,
        "completions/mean_length": 2.5,
        "reward/x": 1.0,
    }


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0"])
def test_an_untested_trl_is_refused_in_one_sentence(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(SeamError, match=f"TRL {version} is installed; entrl was tested with 1.15 <= trl < 1.17"):
        seam.check_seam()


def test_a_trl_of_another_shape_is_refused(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, batch, extra: None)
    with pytest.raises(SeamError, match="GRPOTrainer._compute_loss takes"):
        seam.check_seam()
