"""EntropyBand against hand-computed numbers of both SPINE versions."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.entropy_band import EntropyBand, otsu_exact, otsu_hist
from rl.testing import batch_from_logits, loss_from_signal

LOGITS = [[5, 0, 0, -1], [1, 0.8, 0, -1], [4, 1, 0, 0], [0.6, 0.5, 0.4, 0], [3.5, 0, -1, 0], [1.2, 1, -0.5, 0]]
ADVANTAGE = 0.577348935859  # answers [7, 7, 9, 7], population std
OLD_MINUS_LOGP = [0, -0.10, 0.02, 0.05, 0, -0.30]
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}


def example():
    logits = tensor([LOGITS]).requires_grad_()
    ref = logits.detach() + tensor([0.05, -0.1, 0, 0.1])
    ids = torch.tensor([[0, 1, 0, 2, 0, 1]])
    batch = batch_from_logits(logits, ids, torch.ones(1, 6), tensor([ADVANTAGE]), ref_logits=ref)
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return logits, type(batch)(**{**fields, "old_logp": batch.logp.detach() + tensor([OLD_MINUS_LOGP])})


def run(**kwargs):
    logits, batch = example()
    signal = EntropyBand(**kwargs)(batch, Signal.start(batch))
    return logits, batch, signal


def test_the_example_itself():
    _, batch = example()
    close(
        batch.entropy[0],
        [0.096788998834, 1.187932963438, 0.355236622177, 1.363833244423, 0.312993286516, 1.196996707711],
    )
    close(
        batch.full_kl[0],
        [0.000081641595, 0.002540186660, 0.000512677337, 0.002568892923, 0.000345875666, 0.002946046661],
    )


def test_v1_terms_total_and_band_gradient():
    logits, batch, signal = run(version="v1", selector="quantile", fraction=0.5)
    assert signal.keep[0].tolist() == [False, True, False, True, False, True]
    low, high, kl = signal.penalties
    close(low.per_token[0, 1], 0.001812748855)
    close(high.per_token[0, 3], 0.166836536711)
    close(low.mean(batch.mask) + high.mean(batch.mask), 0.0562164285220339)
    close(kl.mean(batch.mask), 0.0026850420813226746)
    close(loss_from_signal(batch, Signal.start(batch).drop(~signal.keep, signal.rescale), **CLIP), -0.6266930908395186)
    close(loss_from_signal(batch, signal, **CLIP), -0.6261040761334851)
    (low.mean(batch.mask) + high.mean(batch.mask)).backward()
    close(logits.grad[0, 1], [0.049603168927, 0.017104606316, -0.034563969073, -0.032143806171])
    close(logits.grad[0, 3], [-0.018163718245, -0.007218296693, 0.001808424832, 0.023573590105])
    logits.grad[0, [1, 3]] = 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("selector", ["otsu_exact", "otsu_hist100"])
def test_v2_terms_total_and_gradient(selector):
    logits, batch, signal = run(version="v2", selector=selector)
    assert signal.keep[0].tolist() == [False, True, False, True, False, True]
    lower, upper = EntropyBand()._edges(signal.keep, batch.entropy.detach())
    close(lower[0, 0], 1.183558800452019)
    close(upper[0, 0], 1.1969967077114403)
    low, high, kl = signal.penalties
    assert low.mean(batch.mask).item() == 0
    close(high.coef * high.mean(batch.mask), 0.00027806089451910837)
    close(kl.coef * kl.mean(batch.mask), 2.6850420813226745e-05)
    close(loss_from_signal(batch, Signal.start(batch).drop(~signal.keep), **CLIP), -0.3133465454197593)
    loss = loss_from_signal(batch, signal, **CLIP)
    close(loss, -0.313041634104427)
    loss.backward()
    close(logits.grad[0, 1], [0.045716784523, -0.068738835410, 0.016844671120, 0.006177379766])
    close(logits.grad[0, 3], [0.027833776651, 0.025369380904, -0.068618416600, 0.015415259045])
    close(logits.grad[0, 5], [-0.000073484188, 0.000117619553, -0.000000201410, -0.000043933955])
    logits.grad[0, [1, 3, 5]] = 0
    assert (logits.grad == 0).all()


def test_otsu_thresholds():
    _, batch = example()
    close(otsu_exact(batch.mask, batch.entropy.detach())[0, 0], 0.7715847928074157)
    close(otsu_hist(batch.mask, batch.entropy.detach(), bins=100)[0, 0], 0.356533069179466)


def test_otsu_exact_is_the_best_split_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n = int(torch.randint(2, 12, (), generator=generator))
        h = torch.rand(1, 12, generator=generator, dtype=torch.float64)
        mask = (torch.arange(12) < n)[None]
        values = h[mask].sort().values

        def between(split, values=values):
            low, high = values[:split], values[split:]
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2

        best = max(range(1, n), key=between)
        close(otsu_exact(mask, h)[0, 0], (values[best - 1] + values[best]) / 2, 1e-12)


def test_equal_entropies_select_every_token():
    mask, h = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 0.5)
    for threshold in (otsu_exact(mask, h), otsu_hist(mask, h, bins=100)):
        assert (h >= threshold).all()


def test_selection_is_per_response():
    def selected(second_row):
        logits = tensor([LOGITS, second_row])
        batch = batch_from_logits(logits, torch.zeros(2, 6), torch.ones(2, 6), tensor([1, 1]), ref_logits=logits)
        return EntropyBand()(batch, Signal.start(batch)).keep[0].tolist()

    assert selected(LOGITS) == selected([[0.0, 0, 0, 0]] * 6)


def test_no_gradient_at_the_reference_or_inside_the_band():
    logits = tensor([LOGITS]).requires_grad_()
    ids = torch.zeros(1, 6)
    batch = batch_from_logits(logits, ids, torch.ones(1, 6), tensor([0.0]), ref_logits=logits.detach())
    signal = EntropyBand(coef_low=0, coef_high=0, kl_coef=1.0)(batch, Signal.start(batch))
    loss = loss_from_signal(batch, signal)
    loss.backward()
    assert abs(loss.item()) < 1e-15 and logits.grad.abs().max() < 1e-15


def test_needs_follow_the_coefficients():
    assert EntropyBand().needs == {"entropy.grad", "full_kl"} and EntropyBand().promises == {"alone"}
    assert EntropyBand(kl_coef=0).needs == {"entropy.grad"}
    assert not EntropyBand(coef_low=0, coef_high=0, kl_coef=0).needs
    assert not EntropyBand(version="v1").promises


@pytest.mark.parametrize(
    "bad", [{"version": "v3"}, {"selector": "kmeans"}, {"fraction": 0}, {"coef_low": -1}, {"kl_coef": float("nan")}]
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        EntropyBand(**bad)
