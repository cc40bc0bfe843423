"""What the trainer leaves out changes no gradient: against the same training with every saving switched off."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

from rl.contract import PROMISES, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.plugins.rank_shaping import RankShaping
from rl.plugins.steer import Steer
from rl.scoring import Recorded
from rl.sparsity import Cut, Savings, Trim, by_length, expected_gradient, lengths_of, rows_in
from tiny import EntropyTrainer, assert_same, grpo_config, make_trainer, save_model

LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def sparse_reward(prompts, completions, **columns):
    """The completions of every second prompt or so are told apart, the other groups have no spread."""
    return [float(len(c) % 3) * (sum(map(ord, p)) % 2) for p, c in zip(prompts, completions, strict=True)]


class Ragged(EntropyTrainer):
    """Completions of one to eight tokens, recorded by the policy's own forward."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        g = torch.Generator().manual_seed(self.state.global_step)
        lengths = torch.randint(1, 9, (len(prompt_ids),), generator=g)
        return [torch.randint(4, 43, (n,), generator=g).tolist() for n in lengths.tolist()], None

    record = True

    def _record_old_policy(self, output):
        if self.record and "old_per_token_logps" not in output:
            with torch.no_grad():
                both = [torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask")]
                n = output["completion_ids"].shape[1]
                self._sampled = Recorded(*self._get_per_token_logps_and_entropies(self.model, *both, n)[:2], None)
        super()._record_old_policy(output)


class Recording(Ragged):
    calls = None

    def _forward_ahead(self, *args):
        self.calls = (self.calls or 0) + 1
        return super()._forward_ahead(*args)


class Everything(Ragged):
    """No saving at all."""

    record = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.savings, self.trim = Savings(), Trim(False, False)


class InPass(Ragged):
    record = False


def parameters(cls, model, tmp_path, plugins=None, **changes):
    changes = {"reward": sparse_reward, "max_steps": 3, **changes}
    trainer = make_trainer(cls, model, tmp_path, plugins, **changes)
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, trainer


@pytest.mark.parametrize("policy", [{}, OFF_POLICY], ids=["on", "off"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_saving_leaves_the_training_as_it_is(model, tmp_path, loss_type, policy):
    changes = {"loss_type": loss_type, **policy}
    plugins = {"mask": ForkMask(rho=0.3)}
    whole, _ = parameters(Everything, model, tmp_path, plugins, **changes)
    in_pass, _ = parameters(InPass, model, tmp_path, plugins, **changes)
    ahead, trainer = parameters(Recording, model, tmp_path, plugins, **changes)
    assert_same(whole, in_pass)
    assert_same(whole, ahead)
    assert trainer.calls  # the short way was taken
    start = make_trainer(EntropyTrainer, model, tmp_path).model.state_dict()
    assert max((whole[n] - start[n]).abs().max() for n in whole) > 5e-3  # and there was something to learn


@pytest.mark.parametrize(
    "plugin",
    [
        ForkMask(scope="micro", selector="topk", denominator="kept"),
        ForkMask(policy="rollout"),
        ForkMask(rho=0.3, scope="rollout", policy="rollout"),  # 0.2 would fall among first tokens of one prompt: ties
        Steer(),
        EntropyBand(kl_coef=0.0),
        RankShaping(),
        RankShaping(lam_tail=-0.1, k=3),
    ],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("policy", [{}, OFF_POLICY], ids=["on", "off"])
def test_savings_of_every_method(model, tmp_path, plugin, policy):
    whole, _ = parameters(Everything, model, tmp_path, {"it": plugin}, **policy)
    for cls in (InPass, Ragged):
        assert_same(whole, parameters(cls, model, tmp_path, {"it": plugin}, **policy)[0])


def test_adapters(model, tmp_path):
    found = []
    for cls in (Everything, InPass, Recording):
        extra = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
        found.append(parameters(cls, model, tmp_path, {"mask": ForkMask(rho=0.3)}, extra=extra))
    assert found[2][1].calls and any("lora" in name for name in found[0][0])
    for parameters_found, _ in found[1:]:
        assert_same(found[0][0], parameters_found)


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {"entropy_coef": 0.1}, {"importance_sampling_level": "sequence"}])
def test_losses_that_need_more_than_advantages(model, tmp_path, changes):
    whole, _ = parameters(Everything, model, tmp_path, {"mask": ForkMask(rho=0.3)}, **changes)
    for cls in (InPass, Ragged):
        assert_same(whole, parameters(cls, model, tmp_path, {"mask": ForkMask(rho=0.3)}, **changes)[0])


def test_without_any_spread_the_gradient_is_zero_and_every_parameter_has_one(model, tmp_path):
    class Watch(Ragged):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            loss.backward(retain_graph=True)
            assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
            return loss

    for record in (True, False):
        Watch.record = record
        parameters(Watch, model, tmp_path, reward=lambda prompts, completions, **k: [1.0] * len(completions))


@pytest.mark.parametrize("record", [True, False])
def test_a_micro_batch_without_gradient_is_skipped_unless_the_whole_update_has_none(model, tmp_path, record):
    """One group of four has spread at step 1, none at step 2: there the weights still have to decay."""
    calls, tried = [], []

    class Look(Ragged):
        def _compute_loss(self, model, inputs):
            tried.append(inputs["idle"])
            hook = model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
            try:
                return super()._compute_loss(model, inputs)
            finally:
                hook.remove()

    Look.record = record
    rewards = iter([1.0, 0.0])

    def one_group(prompts, completions, **columns):
        spread = next(rewards)
        return [spread * i if p == prompts[0] else 0.0 for i, p in enumerate(prompts)]

    changes = {"weight_decay": 0.1, "max_steps": 2}
    found, _ = parameters(
        Look, model, tmp_path, {"mask": ForkMask(rho=0.5, scope="response")}, reward=one_group, **changes
    )
    assert tried == [True, False, False, False]
    assert sum(calls) == 3 and (len(calls) == 3) == record  # without a record the entropies are still computed
    rewards = iter([1.0, 0.0])
    whole, _ = parameters(
        Everything, model, tmp_path, {"mask": ForkMask(rho=0.5, scope="response")}, reward=one_group, **changes
    )
    assert_same(whole, found)


def test_a_micro_batch_without_trainable_tokens_is_no_stumbling_block_for_a_penalty(model, tmp_path):
    """Its penalty is 0, but still has to find entropies with gradient."""

    class FirstEmpty(Ragged):
        def _next_window(self):
            self._buffered_inputs[0]["completion_mask"] = torch.zeros_like(self._buffered_inputs[0]["completion_mask"])
            return super()._next_window()

    class WholeFirstEmpty(FirstEmpty, Everything):
        pass

    plugins = {"band": EntropyBand(kl_coef=0.0)}
    whole, found = (parameters(cls, model, tmp_path, plugins)[0] for cls in (WholeFirstEmpty, FirstEmpty))
    assert_same(whole, found)


@pytest.mark.parametrize(("changes", "share"), [({}, 0.6), ({"beta": 0.1}, 0.95)], ids=["plain", "KL"])
def test_what_a_forward_sees(model, tmp_path, changes, share):
    """Recorded: only rows with an advantage and a kept token, without the columns nobody needs; with KL the latter only."""
    shapes, scored = [], []

    class Look(Ragged):
        def _compute_loss(self, model, inputs):
            def seen(module, args, kwargs):
                shapes.append((kwargs["input_ids"].shape, inputs["completion_ids"].shape, inputs["prompt_ids"].shape))
                scored.append((int((kwargs["labels"] != -100).sum()), int(self._scored(inputs).sum())))

            hook = model.register_forward_pre_hook(seen, with_kwargs=True)
            try:
                return super()._compute_loss(model, inputs)
            finally:
                hook.remove()

    parameters(Look, model, tmp_path, {"mask": ForkMask(rho=0.2, scope="response")}, **changes)
    assert all(a == b for a, b in scored) and sum(a for a, _ in scored) > 0
    full = sum(c[0] * (c[1] + p[1]) for _, c, p in shapes)
    assert sum(s[0] * s[1] for s, _, _ in shapes) < share * full


class Adds(ForkMask):
    """Gives gradient to completions whose advantage is 0."""

    needs = frozenset()

    def __init__(self):
        pass

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        return signal.shape(signal.advantages + 0.1 * tokens.entropy)


def test_a_plugin_that_moves_rows_without_advantage_must_say_so(model, tmp_path):
    with pytest.raises(ConfigError, match="zero_advantage"):
        parameters(InPass, model, tmp_path, {"adds": Adds()})
    honest = Adds()
    honest.needs = frozenset({"zero_advantage"})
    whole, _ = parameters(Everything, model, tmp_path, {"adds": honest})
    for cls in (InPass, Ragged):
        assert_same(whole, parameters(cls, model, tmp_path, {"adds": honest})[0])


class Penalises(Adds):
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        return signal.penalise("lp", -tokens.logp, 0.1, tokens.mask)


def test_a_penalty_without_gradient_is_refused(model, tmp_path):
    for cls in (InPass, Ragged):
        with pytest.raises(ConfigError, match=r"plugin.pen/lp .*logp\.grad"):
            parameters(cls, model, tmp_path, {"pen": Penalises()})
    honest = Penalises()
    honest.needs = frozenset({"logp.grad"})
    whole, _ = parameters(Everything, model, tmp_path, {"pen": honest})
    for cls in (InPass, Ragged):
        assert_same(whole, parameters(cls, model, tmp_path, {"pen": honest})[0])


def test_vespos_series_are_trls_without_a_plugin(model, tmp_path):
    """TRL averages some series over the shape of the advantages it was given."""
    found = [
        parameters(cls, model, tmp_path, loss_type="vespo")[1].state.log_history for cls in (Everything, Recording)
    ]
    for a, b in zip(*found, strict=True):
        series = [name for name in a if name.startswith("vespo/")]
        assert bool(series) == ("loss" in a) and {n: b[n] for n in series} == pytest.approx({n: a[n] for n in series})


def test_with_dropout_the_record_is_not_taken_for_the_forward(model, tmp_path):
    class Drops(Recording):
        def __init__(self, model, **kwargs):
            model.config.attention_dropout = 0.1
            super().__init__(model=model, **kwargs)

    assert not parameters(Drops, model, tmp_path, {"mask": ForkMask(rho=0.3)})[1].calls
    assert parameters(Drops, model, tmp_path, {"mask": ForkMask(rho=0.3, policy="rollout")})[1].calls


def test_prompt_tuning_is_refused(model, tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="peft: prompt tuning"):
        make_trainer(EntropyTrainer, model, tmp_path, extra={"peft_config": peft})


def test_the_old_policys_pass_is_trimmed_too(model, tmp_path):
    """Off-policy, TRL scores the rollout once more: completions of like length together, without the padding."""
    shapes = []

    class Look(Ragged):
        def _generate_and_score_completions(self, inputs):
            seen = lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape)  # noqa: E731
            hook = self.model.register_forward_pre_hook(seen, with_kwargs=True)
            try:
                return super()._generate_and_score_completions(inputs)
            finally:
                hook.remove()

    parameters(Look, model, tmp_path, **OFF_POLICY)
    widths = [width for _, width in shapes]
    assert all(rows == 8 for rows, _ in shapes) and len(set(widths)) > 1 and min(widths) < max(widths) - 2


def test_cut_keeps_what_is_scored_and_puts_it_back():
    ids = torch.arange(1, 41).view(4, 10)
    attention = torch.ones_like(ids)
    attention[:, :2] = 0  # two columns of padding before every prompt of 4
    scored = torch.zeros(4, 6, dtype=torch.bool)
    scored[1, 0] = scored[3, 2] = True
    cut = Cut.of(ids, attention, scored, rows_in(scored), Trim(True, True))
    assert cut.rows.tolist() == [1, 3] and cut.ids.tolist() == ids[[1, 3], 2:7].tolist()
    assert cut.labels[cut.labels != -100].tolist() == [ids[1, 4], ids[3, 6]]
    values = torch.arange(100.0, 108.0).view(2, 4)
    placed = cut._place(values)
    assert placed[1, 0] == values[0, 1] and placed[3, 2] == values[1, 3] and placed[[0, 2]].eq(0).all()
    placed = cut._place(torch.stack([values, -values], -1))  # several numbers a token
    assert placed.shape == (4, 6, 2) and placed[3, 2].tolist() == [values[1, 3], -values[1, 3]]
    untrimmed = Cut.of(ids, attention, scored, rows_in(scored), Trim(False, False))
    assert untrimmed.ids.shape == (2, 10)


def test_cut_of_nothing_is_one_row():
    ids, nothing = torch.ones(3, 5, dtype=torch.long), torch.zeros(3, 2, dtype=torch.bool)
    cut = Cut.of(ids, ids, nothing, rows_in(nothing), Trim(True, True))
    assert cut.ids.shape == (1, 4) and (cut.labels == -100).all()


def test_order_by_length_keeps_rows_together():
    g = torch.Generator().manual_seed(0)
    scored = [torch.rand(3, 5, generator=g) < 0.3 for _ in range(4)]
    scored[2][1] = False
    batches = [
        {"scored": s, "prompt_mask": torch.ones(3, 2), "row": torch.arange(3) + 10 * i, "n": torch.tensor(7.0)}
        | {"text": [str(10 * i + row) for row in range(3)]}
        for i, s in enumerate(scored)
    ]
    for b in batches:
        b["live"] = b["scored"] & (b["row"] % 2 == 0)[:, None]
    ordered = by_length(batches, [lengths_of(b, b["scored"], b["live"]) for b in batches])
    live = torch.cat([b["live"].any(-1) for b in ordered])
    assert torch.equal(live, live.sort().values) and 0 < live.sum() < 12  # those without gradient come first
    lengths = torch.cat([lengths_of(b, b["scored"], torch.zeros_like(b["live"])) for b in ordered])
    for part in (lengths[~live], lengths[live]):
        assert torch.equal(part, part.sort().values)
    assert lengths[0] == 0
    for batch in ordered:
        assert batch["n"] == 7 and len(batch["row"]) == 3
        assert batch["text"] == [str(row) for row in batch["row"].tolist()]
        for row, s in zip(batch["row"].tolist(), batch["scored"], strict=True):
            assert torch.equal(s, scored[row // 10][row % 10])


@pytest.mark.parametrize(
    ("rope", "left", "right"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True, True),
        ({"rope_type": "yarn"}, True, True),
        ({"full": {"rope_type": "default"}, "sliding": {"rope_type": "yarn"}}, True, True),
        ({"rope_type": "yarn", "llama_4_scaling_beta": 0.1}, False, True),
        ({"rope_type": "dynamic"}, False, False),
        ({"full": {"rope_type": "default"}, "sliding": {"rope_type": "longrope"}}, False, False),
        (None, False, True),
    ],
)
def test_padding_goes_only_where_it_has_no_influence(rope, left, right):
    config = type("Config", (), {"rope_parameters": rope})()
    assert Trim.of(config, None) == Trim(left, right)
    assert Trim.of(config, 8) == Trim(False, False)
    config.attn_temperature_tuning = True
    assert Trim.of(config, None) == Trim(False, right)


def test_what_may_be_saved(tmp_path):
    def of(needs=(), promises=PROMISES, aux=False, dropout=False, **changes):
        args = grpo_config(tmp_path, **changes)
        return Savings.of(args, frozenset(needs), promises, aux_loss=aux, dropout=dropout)

    assert of() == Savings(True, True, True, True, True)
    assert of(aux=True) == Savings()
    assert of(promises={"alone"}) == Savings(True, True, False, True, True)
    assert of(promises={"recorded"}) == Savings(True, True, True, False, True)
    assert of(promises={"alone"}, dropout=True) == Savings(rows=True, order=True, order_ahead=True)
    assert of(dropout=True) == of()
    assert not of(loss_type="bnpo").order_ahead and of(loss_type="bnpo").tokens
    assert not of(loss_type="vespo").stale and of(loss_type="vespo").rows
    assert not of({"zero_advantage"}).rows and of({"zero_advantage"}).tokens
    for found in (of({"entropy.grad"}), of({"logp.grad"}), of({"full_kl"})):
        assert found == Savings()
    assert of(beta=0.1) == Savings(order=True, order_ahead=True)
    assert of(importance_sampling_level="sequence") == Savings(rows=True, order=True, order_ahead=True)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_expected_gradient_is_the_gradient_up_to_a_factor(model, tmp_path, loss_type):
    """Against autograd through TRL's own loss, on-policy."""
    found = []

    class Compare(Ragged):
        def _forward_ahead(self, model, inputs, ids, attention):
            mask = self._loss_mask(inputs).bool()
            expected = expected_gradient(self.args, inputs, mask, inputs["effective"])
            logp, entropy, _ = super()._forward_ahead(model, inputs, ids, attention)
            logp = logp.detach().requires_grad_()
            found.append((expected, logp))
            return logp, entropy, None

    parameters(Compare, model, tmp_path, loss_type=loss_type, max_steps=1)
    seen = False
    for expected, logp in found:
        if loss_type == "vespo":
            assert expected is None
            continue
        at = expected.abs().argmax()
        factor = logp.grad.flatten()[at] / expected.flatten()[at] if expected.any() else 1.0
        torch.testing.assert_close(logp.grad, expected * factor, rtol=1e-6, atol=1e-9)
        seen |= bool(expected.any())
    assert seen or loss_type == "vespo"
