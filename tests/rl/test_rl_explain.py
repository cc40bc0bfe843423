"""What entrl explain says is what the trainer does: its numbers are read back from the text and the loss computed with them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from rl.config import compose, plugin_names
from rl.contract import Signal
from rl.errors import ConfigError
from rl.explain import explain
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.plugins.steer import Steer
from rl.testing import batch_from_logits
from tiny import EntropyTrainer, make_trainer, save_model

ROOT = Path(__file__).parents[2]
LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
EXPERIMENTS = sorted(
    str(p.relative_to(ROOT / "configs/experiment").with_suffix("")) for p in ROOT.glob("configs/experiment/**/*.yaml")
)

# what the trainer of the tests is given (tests/tiny.py), in the words of the configuration
TINY = {
    "max_completion_length": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
}
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2}


def told(*overrides, **trainer):
    return explain(compose([*overrides, *(f"trainer.{key}={value}" for key, value in trainer.items())]))


def line(text, label):
    """What stands behind a label, its wrapped lines joined."""
    found = re.search(rf"^  {re.escape(label)} +(.*(?:\n {{18}}.*)*)", text, re.MULTILINE)
    assert found, f"no {label!r} in\n{text}"
    return " ".join(found[1].split())


def numbers(text):
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*\.?\d*", text)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


# ---- the loss ------------------------------------------------------------------------------------------------------------------


class Watched(EntropyTrainer):
    """Keeps what each loss was made of, and what it was."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.seen[-1].loss = loss.detach()
        return loss

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        inputs, given = self._open, None if self._open is None else self._open["advantages"]
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if inputs is not None:
            logp, advantages = found[0].detach(), inputs["advantages"]
            self.seen.append(
                SimpleNamespace(
                    logp=logp,
                    old=inputs.get("old_per_token_logps", logp),
                    ref=inputs.get("ref_per_token_logps"),
                    entropy=found[1].detach(),
                    mask=inputs["completion_mask"],
                    given=given,
                    advantages=advantages if advantages.dim() == 2 else advantages[:, None],
                    reward=inputs["reward"],
                    group=inputs["group"],
                    rollout_tokens=inputs["num_items_in_batch"],
                )
            )
        return found


def trained(model, folder, plugins=None, **changes):
    """What each loss of a training was made of."""
    trainer = make_trainer(Watched, model, folder, plugins, learning_rate=0.5, **changes)
    trainer.seen = []
    trainer.train()
    return trainer.seen


def term(text, loss_type, logp, old, a, mask):
    """(B, T) of every token, with the numbers of the text."""
    log_ratio = logp - old
    r = log_ratio.exp()
    said = numbers(line(text, "lᵢₜ"))
    if loss_type == "cispo":
        (cap, _) = said
        return -r.clamp(max=cap) * a * logp
    if loss_type == "sapo":
        up, down = said[2], said[4]  # (4/τ) σ(τ (r - 1)) A, τ = up where A > 0, else down
        tau = torch.where(a > 0, up, down)
        return -4 / tau * torch.sigmoid(tau * (r - 1)) * a
    if loss_type == "vespo":
        (k_up, lambda_up, _, k_down, lambda_down) = said
        w = (log_ratio * mask).sum(-1, keepdim=True).exp()
        k, lam = torch.where(a >= 0, k_up, k_down), torch.where(a >= 0, lambda_up, lambda_down)
        return -(lam + k * w.log() - lam * w).exp() * a * logp
    low, high = said
    return -torch.min(r * a, r.clamp(low, high) * a)


def mean(text, losses, masks, rollout_tokens):
    """The formula L over the micro-batches of one update, with the numbers of the text."""
    formula = line(text, "L")
    rows = torch.cat([(loss * mask).sum(-1) for loss, mask in zip(losses, masks, strict=True)])
    lengths = torch.cat([mask.sum(-1) for mask in masks])
    if formula == "1/n Σᵢ 1/Nᵢ Σₜ lᵢₜ":
        return (rows / lengths).sum() / numbers(line(text, "n"))[0]
    if formula == "1/n Σᵢ Σₜ lᵢₜ":
        return rows.sum() / numbers(line(text, "n"))[0]
    if formula == "1/D Σᵢ Σₜ lᵢₜ":
        return rows.sum() / numbers(line(text, "D"))[0]
    if formula.startswith("1/m Σ_b 1/N_b"):
        parts = [(loss * mask).sum() / mask.sum() for loss, mask in zip(losses, masks, strict=True)]
        return sum(parts) / numbers(line(text, "m"))[0]
    assert formula == "1/N Σᵢ Σₜ lᵢₜ"
    share = re.search(r"x (\d+)/(\d+)", line(text, "N"))
    return rows.sum() / (rollout_tokens * (int(share[1]) / int(share[2]) if share else 1))


@pytest.mark.parametrize("loss_type, policy", [*((kind, OFF_POLICY) for kind in LOSSES), ("dapo", {}), ("bnpo", {})])
def test_the_stated_loss_is_the_trainers(model, tmp_path, loss_type, policy):
    changes = {"loss_type": loss_type, "epsilon": 0.02, "epsilon_high": 5.0 if loss_type == "cispo" else 0.03, **policy}
    text = told("plugin=[]", **TINY, **changes)
    seen = trained(model, tmp_path, max_steps=4, **changes)
    for update in range(4):
        window = seen[2 * update : 2 * update + 2]
        losses = [term(text, loss_type, s.logp, s.old, s.advantages, s.mask) for s in window]
        expected = mean(text, losses, [s.mask for s in window], window[0].rollout_tokens)
        found = sum(s.loss for s in window)
        torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)
    assert ("on-policy" in text.partition("The advantage")[0]) == (not policy)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_kl_is_added_as_stated(model, tmp_path, loss_type):
    changes = {"loss_type": loss_type, "beta": 0.3, "epsilon_high": 0.28, **OFF_POLICY}
    text = told("plugin=[]", **TINY, **changes)
    assert "k = r (exp(d) - d - 1), d = ln p_ref - ln p" in line(text, "KL")
    window = trained(model, tmp_path, max_steps=4, **changes)[6:8]
    losses = []
    for s in window:
        d, r = s.ref - s.logp, (s.logp - s.old).exp()
        kl = numbers(line(text, "KL"))[0] * r * (d.exp() - d - 1)
        losses.append(term(text, loss_type, s.logp, s.old, s.advantages, s.mask) + kl)
    expected, found = (
        mean(text, losses, [s.mask for s in window], window[0].rollout_tokens),
        sum(s.loss for s in window),
    )
    torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)


def test_the_stated_advantage_is_the_trainers(model, tmp_path):
    for scale in ("group", "batch", "none"):
        text = told(**TINY, scale_rewards=scale)
        seen = trained(model, tmp_path, max_steps=1, scale_rewards=scale)
        reward, a, group = (torch.cat([getattr(s, name) for s in seen]) for name in ("reward", "advantages", "group"))
        same = group[:, None] == group
        assert f"the mean over the {int(same.sum(1).unique())} completions of one prompt" in line(text, "A")
        expected = reward - (same * reward).sum(1) / same.sum(1)
        if scale != "none":
            of = [reward[row].std() for row in same] if scale == "group" else [reward.std()] * len(reward)
            assert f"over the {4 if scale == 'group' else len(reward)} completions" in line(text, "s")
            expected = expected / (torch.stack(of) + numbers(line(text, "A"))[0])
        torch.testing.assert_close(a.flatten(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_the_stated_mask_and_denominator_are_the_trainers(model, tmp_path, denominator):
    text = told("plugin.fork_mask.rho=0.4", f"plugin.fork_mask.denominator={denominator}", **TINY)
    level = float(re.search(r"keep = 1\[H >= τ\], +τ = the (\S+)-quantile of H", text)[1])
    assert "over the tokens of the 8 completions of one forward" in line(text, "τ")
    plugins = {"fork_mask": ForkMask(rho=0.4, denominator=denominator)}
    for s in trained(model, tmp_path, plugins, max_steps=1):
        keep = (s.entropy >= torch.quantile(s.entropy[s.mask.bool()], level)) & s.mask.bool()
        kept = "the loss x n_all / n_kept" in line(text, "denominator")
        assert kept == (denominator == "kept")
        expected = s.given[:, None] * keep * (s.mask.sum() / keep.sum() if kept else 1)
        torch.testing.assert_close(s.advantages, expected, rtol=1e-5, atol=1e-6)


# ---- plug-ins ------------------------------------------------------------------------------------------------------------------


def test_a_plugins_penalty_and_weight_are_as_stated():
    text = told("plugin=[entropy_band,steer]", "plugin.entropy_band.coef_high=0.25", "plugin.entropy_band.kl_coef=0")
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 6, 9, generator=g, dtype=torch.float64)
    tokens = batch_from_logits(
        logits, torch.zeros(4, 6), torch.ones(4, 6), torch.randn(4, generator=g).double(), logits * 0.9
    )
    high = EntropyBand(coef_high=0.25, kl_coef=0)(tokens, Signal.start(tokens)).penalties[1]
    assert line(text, "penalty high").startswith(
        "L + 0.25 x its sum over the selected tokens / the number of all tokens counts are those of the 256"
    )
    assert (high.coef, high.mean(tokens.mask)) == (0.25, (high.per_token * high.where).sum() / 24)
    p, old = tokens.logp.exp(), tokens.old_logp.exp()
    omega = (tokens.advantages / old * p * (1 - p) * (p.log() + tokens.old_entropy)).abs()
    assert "Ω = (A / p_old) p (1 - p) (ln p + H)" in text
    low, k = (float(x) for x in re.search(r"w = clamp\(exp\(-k \|Ω\|\), (\S+), 1\),\s+k = (\S+) /", text).groups())
    weight = (-k / omega.max() * omega).exp().clamp(low, 1)
    torch.testing.assert_close(Steer()(tokens, Signal.start(tokens)).weight, weight, rtol=0, atol=1e-4)


def test_order_scopes_and_policies_are_told():
    text = told("plugin=[rank_shaping,steer,fork_mask]", "plugin.steer.scope=response", **OFF_POLICY)
    assert line(text, "order") == "steer reads the advantages that rank_shaping shaped"
    assert text.index("Plug-in 1: rank_shaping") < text.index("Plug-in 2: steer") < text.index("Plug-in 3: fork_mask")
    assert line(text, "max |Ω|") == "over the tokens of its completion (response)"
    assert "does not matter" in line(told("plugin=[steer,fork_mask]"), "order")
    early = line(told("plugin=[steer,rank_shaping,w_reinforce]"), "order")
    assert "steer reads the advantages before rank_shaping shapes them" in early
    assert "steer reads the advantages before w_reinforce replaces them" in early
    assert "off-policy p is another one in each of the 8 updates" in text
    on = told("plugin=[fork_mask]", "plugin.fork_mask.policy=rollout")
    assert "fixed at the rollout" in line(on, "reads")


def test_what_is_left_out_follows_the_trainers_own_rules():
    left = told().partition("Left out, exactly")[2]
    assert "no forward of the head where A x weight x keep is 0" in left and "no forward where A is 0" in left
    penal = told("plugin=[entropy_band]").partition("Left out, exactly")[2]
    assert "plugin.entropy_band (entropy.grad, full_kl) may give gradient" in penal and "no forward" not in penal
    hf = told("rollout=hf").partition("Left out, exactly")[2]
    assert "a forward, but no backward where A is 0" in hf


def test_a_shadow_is_told_apart():
    text = told("plugin=[fork_mask,steer]", "plugin.steer.shadow=true")
    assert "Shadow: steer" in text and "changes nothing" in text and "Plug-in 2" not in text


def test_a_private_method_without_explain_has_its_first_sentence(tmp_path, monkeypatch):
    (tmp_path / "lab.py").write_text(
        '"""A lab."""\n\n\nclass Mine:\n    """Leave everything\n    as it is.\n\n    More.\n    """\n\n'
        "    needs, neutral = frozenset(), {}\n\n    def __call__(self, tokens, signal):\n        return signal\n"
    )
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "mine.yaml").write_text("mine: {_target_: lab.Mine}\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = explain(compose(["plugin=[mine,steer]"], str(tmp_path)))
    assert line(text, "effect") == "Leave everything as it is" and "no explain()" in text
    assert line(text, "order") == "not known to matter or not: mine cannot say what it reads"


# ---- all of it -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_explained(experiment):
    cfg = compose([f"experiment={experiment}"])
    text = explain(cfg)
    assert max(map(len, text.splitlines())) <= 100 and "None" not in text
    assert all(f": {name}" in text for name in cfg.plugin)


@pytest.mark.parametrize("name", plugin_names())
def test_what_a_yaml_sets_is_what_is_told(name):
    assert f"Plug-in 1: {name}" in told(f"plugin=[{name}]", "trainer.loss_type=dr_grpo", "trainer.beta=0.1")


def test_bad_settings_are_refused_with_all_their_flaws():
    with pytest.raises(ConfigError, match="rho=7 is not a fraction.*\n.*loss_type=dpo is not known"):
        told("plugin.fork_mask.rho=7", loss_type="dpo")


def test_the_page_of_the_documentation_is_the_programs():
    page = (ROOT / "docs" / "explain.md").read_text()
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].rstrip("\n")
    assert shown == explain(compose()), "run entrl explain and paste what it prints into docs/explain.md"


def test_it_reads_no_model_and_no_data():
    cfg = compose(["model=local", "model.path=nobody/has-this", "data=gsm8k"])
    assert "nobody/has-this" in explain(OmegaConf.merge(cfg, {"data": {"path": "nor/that"}}))
