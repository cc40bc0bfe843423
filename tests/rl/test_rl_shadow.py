"""Shadow plug-ins: they measure what they would do to plain GRPO, and change nothing."""

from dataclasses import replace

import pytest
import torch

from ranks import two_ranks
from rl import build, rundir
from rl.config import compose
from rl.contract import Signal
from rl.errors import ConfigError
from rl.meter import Meter
from rl.pipeline import Pipeline
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.plugins.rank_shaping import RankShaping
from rl.plugins.steer import Steer
from rl.shadows import acting_plugins, shadow_plugins
from rl.testing import batch_from_logits
from rl.wandb_run import plugins
from tiny import EntropyTrainer, assert_same, make_trainer, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class Act:
    """Does what it is told, counts its calls and draws a random number."""

    neutral = {}

    def __init__(self, act, needs=()):
        self.act, self.needs, self.calls = act, frozenset(needs), 0

    def __call__(self, tokens, signal):
        self.calls += 1
        torch.rand(3)
        return self.act(tokens, signal)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

    def check(self, run):
        return ["beware."]


def tokens(seed=0, rows=4):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 5, 7, generator=g, dtype=torch.float64)
    mask = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=g)
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    return batch_from_logits(logits, torch.zeros(rows, 5), mask, advantages)


def columns(*chosen):
    where = torch.zeros(4, 5, dtype=torch.bool)
    where[:, list(chosen)] = True
    return where


def series(pipeline, *batches):
    meter = Meter(CPU)
    for batch in batches:
        meter.add(pipeline(batch).metrics)
    return meter.flush()


# ---- the numbers -------------------------------------------------------------------------------------------------------------


def full_batch(advantages=(1.0, -1.0, 0.5, 2.0)):
    logits = torch.zeros(4, 5, 3, dtype=torch.float64)
    return batch_from_logits(logits, torch.zeros(4, 5), torch.ones(4, 5), torch.tensor(advantages).double())


def test_overlap_by_hand():
    acts = Act(lambda t, s: s.drop(columns(0, 1)))  # touches columns 0 and 1, keeps 2, 3, 4
    shadow = Act(lambda t, s: s.drop(columns(1, 2, 3)))  # touches 1, 2, 3, keeps 0 and 4
    found = series(Pipeline({"acts": acts}, {"it": shadow}), full_batch())
    assert found["shadow/it/jaccard"] == 1 / 4  # column 1 of columns 0 to 3
    assert found["shadow/it/cosine"] == pytest.approx(1 / (3 * 2) ** 0.5)  # column 4 of three and two
    assert found["plugin/it/touched"] == 3 / 5 and found["plugin/it/adv_mass"] == pytest.approx(2 / 5)
    assert found["plugin/acts/touched"] == 2 / 5


def test_a_penalty_counts_as_touched_but_has_no_advantage():
    acts = Act(lambda t, s: s.drop(columns(0)))
    shadow = Act(lambda t, s: s.penalise("p", t.entropy, 1.0, columns(0, 1)))
    found = series(Pipeline({"acts": acts}, {"it": shadow}), full_batch())
    assert found["shadow/it/jaccard"] == 1 / 2 and found["shadow/it/cosine"] == pytest.approx((4 / 5) ** 0.5)


def test_a_shadow_sees_plain_grpo_and_not_what_others_did():
    seen = []
    halve = Act(lambda t, s: s.scale(torch.full_like(s.weight, 0.5)))
    look = Act(lambda t, s: seen.append(s) or s)
    batch = tokens()
    Pipeline({"halve": halve}, {"first": halve, "look": look})(batch)
    assert torch.equal(seen[0].effective, Signal.start(batch).effective) and not seen[0].metrics


def test_opposite_advantages_have_cosine_minus_one_and_none_have_no_cosine():
    turn = Act(lambda t, s: s.shape(-s.advantages))
    assert series(Pipeline({}, {"it": turn}), tokens())["shadow/it/cosine"] == pytest.approx(-1)
    assert "shadow/it/cosine" not in series(Pipeline({}, {"it": turn}), full_batch((0.0,) * 4))


def test_without_an_acting_plugin_there_is_a_cosine_to_plain_grpo_and_no_jaccard():
    found = series(Pipeline({}, {"it": Act(lambda t, s: s.drop(columns(0)))}), full_batch())
    assert found["shadow/it/cosine"] == pytest.approx((4 / 5) ** 0.5) and "shadow/it/jaccard" not in found


def test_micro_batches_add_up_to_the_whole_and_are_not_averaged():
    whole = tokens(rows=12)
    fields = {f: getattr(whole, f) for f in whole.__dataclass_fields__}
    rows = {f: v for f, v in fields.items() if isinstance(v, torch.Tensor)}
    parts = [replace(whole, **{f: v[i] for f, v in rows.items()}) for i in (slice(0, 2), slice(2, 3), slice(3, 12))]
    pipeline = Pipeline(
        {"mask": ForkMask(rho=0.4, scope="response")}, {"steer": Steer(scope="response"), "rank": RankShaping()}
    )
    one, many = series(pipeline, whole), series(pipeline, *parts)
    names = [name for name in one if name.startswith(("shadow/", "plugin/"))]
    assert len(names) >= 4 and {n: one[n] for n in names} == pytest.approx({n: many[n] for n in names}, rel=1e-12)
    averaged = sum(series(pipeline, part)["shadow/steer/cosine"] for part in parts) / 3
    assert averaged != pytest.approx(one["shadow/steer/cosine"], rel=1e-4)


def _half(rank):
    whole = tokens(rows=12)
    fields = {f: getattr(whole, f) for f in whole.__dataclass_fields__}
    own = {f: v[6 * rank : 6 * rank + 6] for f, v in fields.items() if isinstance(v, torch.Tensor)}
    meter = Meter(CPU)
    meter.add(_pair()(replace(whole, **own)).metrics)
    return meter.flush()


def _pair():
    return Pipeline(
        {"mask": ForkMask(rho=0.4)}, {"steer": Steer(scope="world"), "band": EntropyBand(version="v1", kl_coef=0.0)}
    )


def test_two_ranks_are_one_process():
    expected = {n: v for n, v in series(_pair(), tokens(rows=12)).items() if not n.startswith("time/")}
    assert {"shadow/steer/cosine", "shadow/band/jaccard"} <= expected.keys()
    for found in two_ranks(_half):
        assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-6)


# ---- what they need, keep and say ----------------------------------------------------------------------------------------------


def test_a_shadow_gets_values_without_gradient_and_its_promises_count():
    shadow = Act(lambda t, s: s, {"entropy.grad", "zero_advantage", "logp.grad", "rank", "full_kl"})
    pipeline = Pipeline({"steer": Steer(scope="response")}, {"it": shadow})
    assert pipeline.needs == {"old_entropy", "rank", "full_kl"}
    assert Pipeline({}, {}).promises == {"alone", "recorded"} and not pipeline.promises


def test_it_draws_no_random_number_from_the_run():
    before = torch.get_rng_state()
    Pipeline({}, {"it": Act(lambda t, s: s)})(tokens())
    assert torch.equal(torch.get_rng_state(), before)


def test_state_is_kept_and_a_shadow_may_come_and_go():
    first = Pipeline({}, {"it": Act(lambda t, s: s), "gone": Act(lambda t, s: s)})
    first(tokens())
    again = Pipeline({}, {"it": Act(lambda t, s: s), "new": Act(lambda t, s: s)})
    again.load_state_dict(first.state_dict())
    assert again.shadows["it"].calls == 1 and again.shadows["new"].calls == 0
    assert again.check(None) == ["plugin.it (a shadow): beware.", "plugin.new (a shadow): beware."]


# ---- configuration -------------------------------------------------------------------------------------------------------------


def test_a_word_makes_any_plugin_a_shadow(tmp_path):
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "mine.yaml").write_text("mine: {_target_: rl.plugins.steer.Steer}\n")
    cfg = compose(
        ["plugin=[fork_mask,mine,steer]", "plugin.mine.shadow=true", "plugin.steer.shadow=false"], str(tmp_path)
    )
    assert (acting_plugins(cfg), shadow_plugins(cfg)) == (["fork_mask", "steer"], ["mine"])
    made = build.pipeline(cfg)
    assert (list(made.plugins), list(made.shadows)) == (["fork_mask", "steer"], ["mine"])
    assert rundir.run_name("m", "d", acting_plugins(cfg), 1).startswith("m_d_fork_mask+steer_s1_")
    assert plugins(cfg) == "fork_mask+steer"  # what W&B groups by


def test_bad_words_are_refused():
    with pytest.raises(ConfigError, match="plugin.fork_mask.shadow=perhaps is neither true nor false"):
        build.pipeline(compose(["plugin.fork_mask.shadow=perhaps"]))
    with pytest.raises(ConfigError, match="plugin.steer has settings .shadow. but is not selected"):
        compose(["plugin.steer.shadow=true"])


# ---- training ------------------------------------------------------------------------------------------------------------------

SHADOWS = {
    "same forward": lambda: {"steer": Steer(), "shaping": RankShaping(), "quantile": ForkMask(rho=0.5)},
    "gradients not given": lambda: {"band": EntropyBand(kl_coef=0.0), "rank": RankShaping(lam_tail=-0.1, k=3)},
    "another forward": lambda: {"band": EntropyBand(), "rollout": ForkMask(rho=0.5, scope="rollout")},
}
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}


def trained(model, folder, shadows, plugins, **changes):
    lines = []
    extra = {"pipeline": Pipeline(plugins, shadows), "sinks": [lambda step, metrics, hist: lines.append(metrics)]}
    trainer = make_trainer(EntropyTrainer, model, folder, extra=extra, **changes)
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, lines, trainer


@pytest.mark.parametrize("policy", [{}, OFF_POLICY], ids=["on", "off"])
@pytest.mark.parametrize("acting", [{}, {"mask": ForkMask(rho=0.3)}], ids=["grpo", "mask"])
@pytest.mark.parametrize("case", SHADOWS)
def test_the_training_is_that_without_them(model, tmp_path, case, acting, policy):
    alone, _, plain = trained(model, tmp_path, {}, acting, **policy)
    beside, lines, trainer = trained(model, tmp_path, SHADOWS[case](), acting, **policy)
    assert_same(alone, beside)
    if acting and case == "same forward":
        assert trainer.savings == plain.savings
        assert all(torch.equal(alone[n], beside[n]) for n in alone)  # bit for bit
    for name in trainer.pipeline.shadows:
        assert all(line[f"plugin/{name}/touched"] > 0 and -1 <= line[f"shadow/{name}/cosine"] <= 1 for line in lines)
        assert all(0 <= line[f"shadow/{name}/jaccard"] <= 1 for line in lines if acting)


def test_a_shadow_of_what_acts_agrees_with_it(model, tmp_path):
    _, lines, _ = trained(model, tmp_path, {"same": ForkMask(rho=0.3)}, {"mask": ForkMask(rho=0.3)}, **OFF_POLICY)
    for line in lines:
        assert line["shadow/same/jaccard"] == 1 and line["shadow/same/cosine"] == pytest.approx(1)
        assert line["plugin/same/touched"] == line["plugin/mask/touched"]
