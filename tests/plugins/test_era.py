"""Era against the paper's activation written out in plain torch, and in training against the whole loss from the logits."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.pipeline import Pipeline
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.era import Era
from rl.testing import batch_from_logits, loss_from_signal
from tiny import EntropyTrainer, assert_same, make_trainer, save_model, train

# a certain completion that is right, one that is wrong, an uncertain one that is right, one between
SPREAD, A = [8.0, 8.0, 0.1, 2.5], [1.2, -0.8, 0.7, 0.5]
RANGE = {"low": 0.45, "high": 1.5}


def example(columns=12, vocab=6):
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(4, columns, vocab, generator=g, dtype=torch.float64)
    peak = torch.nn.functional.one_hot(torch.randint(0, vocab, (4, columns), generator=g), vocab)
    logits = (peak * tensor(SPREAD)[:, None, None] + 0.3 * noise).requires_grad_()
    ids = torch.randint(0, vocab, (4, columns), generator=g)
    mask = torch.arange(columns) < torch.tensor([[12], [9], [11], [3]])
    return logits, batch_from_logits(logits, ids, mask, tensor(A))


def reference(logits, batch, k, scale_advantages, low, high):
    """The loss of the paper for each completion by itself."""
    total = 0.0
    for z, ids, mask, a in zip(logits, batch.ids, batch.mask, batch.advantages[:, 0], strict=True):
        z, ids = z[mask], ids[mask]
        p = z.detach().softmax(-1)
        h = -(p * p.log()).sum(-1)
        top = h.topk(max(1, int(0.2 * len(h)))).values.mean()
        if a > 0 and top < low:
            z, a = k * z, a / k if scale_advantages else a
        elif a > 0 and top > high:
            z, a = z / k, a * k if scale_advantages else a
        logp = z.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        total = total - (a * (logp - logp.detach()).exp()).sum()
    return total / batch.mask.sum()


@pytest.mark.parametrize("scale_advantages", [True, False])
@pytest.mark.parametrize("k", [2.0, 3.5])
def test_loss_and_gradient_are_the_papers(k, scale_advantages):
    logits, batch = example()
    signal = Era(k=k, scale_advantages=scale_advantages, **RANGE)(batch, Signal.start(batch))
    scales = [row[mask].unique().tolist() for row, mask in zip(signal.logit_scale, batch.mask, strict=True)]
    assert scales == [[k], [1.0], [1 / k], [1.0]]
    ours = loss_from_signal(batch, signal, logits=logits)
    theirs = reference(logits, batch, k, scale_advantages, **RANGE)
    close(ours, theirs)
    close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)), 1e-12)


def test_the_gradient_is_that_of_the_scaled_policy():
    """The paper's reason for A / k: the logits get A (1[y] - p'), as if p' were the policy."""
    logits, batch = example()
    signal = Era(k=2.0, **RANGE)(batch, Signal.start(batch))
    loss_from_signal(batch, signal, logits=logits).backward()
    scaled = (logits * signal.logit_scale[..., None]).detach()
    chosen = torch.nn.functional.one_hot(batch.ids, logits.shape[-1])
    weight = (batch.advantages * batch.mask / batch.mask.sum())[..., None]
    close(logits.grad, -weight * (chosen - scaled.softmax(-1)), 1e-12)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class Checked(EntropyTrainer):
    """Compares the log-probabilities that its loss gets with those of the model's own logits."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        loss = self._open
        out = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if loss is not None:
            z = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
            z = z / self.temperature
            ids, mask, scale = loss["completion_ids"], self._loss_mask(loss).bool(), self._signal.logit_scale

            def of(z):
                return z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

            torch.testing.assert_close(out[0][mask], of(z * scale[..., None])[mask], rtol=1e-4, atol=1e-5)
            assert "old_per_token_logps" not in loss
            self.seen |= set(scale[mask].unique().tolist())
            weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
            gradients = [
                torch.autograd.grad((weights * logp).sum(), model.parameters(), retain_graph=True)
                for logp in (out[0], of(z * scale[..., None]))
            ]
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        return out

    seen: set = set()


def test_the_trainers_loss_gets_the_log_probabilities_of_scaled_logits(model, tmp_path):
    plugins = {"era": Era(low=2.8, high=2.82, k=2.0)}
    trainer = make_trainer(Checked, model, tmp_path, plugins, temperature=0.9, max_steps=3)
    trainer.seen = set()
    trainer.train()
    assert trainer.seen == {0.5, 1.0, 2.0}


@pytest.mark.parametrize("stale", [{"steps_per_generation": 4}, {"num_iterations": 2}])
def test_refuses_an_old_policy_whose_scaled_logits_are_not_known(model, tmp_path, stale):
    with pytest.raises(ConfigError, match="known on-policy only.*steps_per_generation=2 trainer.num_iterations=1"):
        make_trainer(EntropyTrainer, model, tmp_path, {"era": Era()}, **stale)


def test_nothing_is_scaled_inside_the_range_nor_disturbs_who_reads_the_same_hidden_states(model, tmp_path):
    plain = train(EntropyTrainer, model, tmp_path)
    assert_same(plain, train(EntropyTrainer, model, tmp_path, {"era": Era(low=0.0, high=1e9)}))
    band = train(EntropyTrainer, model, tmp_path, {"band": EntropyBand()})
    both = {"era": Era(low=0.0, high=1e9), "band": EntropyBand()}
    assert_same(band, train(EntropyTrainer, model, tmp_path, both))


def test_who_scales_logits_says_so():
    class Silent(Era):
        needs = frozenset()

    _, batch = example()
    pipeline = Pipeline({"era": Silent(**RANGE)})
    with pytest.raises(ConfigError, match='Add "logit_scale" to its needs'):
        pipeline.check_gradients(pipeline(batch))


@pytest.mark.parametrize("bad", [{"low": 3.0}, {"k": 0}, {"fraction": 0}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Era(**bad)
