from dataclasses import replace

import pytest
import torch

from ranks import two_ranks
from rl.contract import Signal
from rl.dynamics import Dynamics
from rl.plugins.fork_mask import ForkMask
from rl.plugins.steer import Steer
from rl.testing import batch_from_logits


def batch(seed=0, rows=40, columns=50, vocab=20):
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, columns, vocab, generator=g) * torch.rand(rows, columns, 1, generator=g)
    mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=g)
    ids = torch.distributions.Categorical(logits=logits).sample() if seed < 0 else logits.argmax(-1)
    return batch_from_logits(logits, ids, mask, torch.randn(rows, generator=g))


def observe(tokens, plugin=None, dynamics=None, lr=0.1):
    dynamics = dynamics or Dynamics(reference_p80=0.5)
    signal = Signal.start(tokens)
    dynamics.observe(tokens, signal if plugin is None else plugin(tokens, signal), lr)
    return dynamics


def test_series_are_what_their_names_say():
    tokens = batch()
    metrics, histograms = observe(tokens, ForkMask(rho=0.2)).flush()
    h, mask = tokens.entropy, tokens.mask
    keep = ForkMask(rho=0.2)(tokens, Signal.start(tokens)).keep
    assert metrics["entropy/mean"] == pytest.approx(h[mask].mean().item(), rel=1e-5)
    assert metrics["entropy/kept"] == pytest.approx(h[keep].mean().item(), rel=1e-5)
    assert metrics["entropy/dropped"] == pytest.approx(h[mask & ~keep].mean().item(), rel=1e-5)
    assert metrics["entropy/above_reference_p80"] == pytest.approx((h[mask] > 0.5).float().mean().item())
    for sign, name in ((1, "positive"), (-1, "negative")):
        where = mask & (tokens.advantages.sign() == sign)
        assert metrics[f"entropy/{name}_advantage"] == pytest.approx(h[where].mean().item(), rel=1e-5)
    for q in (50, 80, 95):
        assert metrics[f"entropy/p{q}"] == pytest.approx(torch.quantile(h[mask], q / 100).item(), rel=0.03)
    top = h[mask].sort(descending=True).values[: int(0.2 * mask.sum())]
    assert metrics["entropy/top20_mean"] == pytest.approx(top.mean().item(), rel=0.01)
    shown = histograms["entropy/hist"]
    assert sum(shown.counts) == mask.sum() and len(shown.edges) == len(shown.counts) + 1


def test_position_quarters():
    tokens = batch()
    entropy = torch.arange(8.0).expand(1, 8)
    one = replace(
        tokens,
        **{f: getattr(tokens, f)[:1, :8] for f in ("ids", "logp", "old_logp", "advantages")},
        mask=torch.ones(1, 8, dtype=torch.bool),
        entropy=entropy,
    )
    metrics = observe(one).flush()[0]
    assert [metrics[f"entropy/position_q{q}"] for q in (1, 2, 3, 4)] == [0.5, 2.5, 4.5, 6.5]


def test_predicted_change_is_steers_theorem_times_the_learning_rate():
    tokens = batch()
    omega = Steer(form="theorem").omega(tokens, tokens.advantages)[tokens.mask].mean().item()
    assert observe(tokens, lr=0.1).flush()[0]["entropy/predicted_change"] == pytest.approx(-0.1 * omega, rel=1e-4)


def test_measured_change_is_between_flushes_and_survives_a_resume():
    dynamics = observe(batch(0))
    first = dynamics.flush()[0]
    assert "entropy/measured_change" not in first
    resumed = Dynamics(0.5)
    resumed.load_state_dict(dynamics.state_dict())
    second = observe(batch(1), dynamics=resumed).flush()[0]
    assert second["entropy/measured_change"] == pytest.approx(second["entropy/mean"] - first["entropy/mean"])


def test_micro_batches_add_up():
    tokens = batch()
    whole = observe(tokens).flush()[0]
    halves = Dynamics(0.5)
    for part in (slice(0, 7), slice(7, 40)):
        fields = {f: v[part] for f in tokens.__dataclass_fields__ if isinstance(v := getattr(tokens, f), torch.Tensor)}
        fields.pop("rollout_entropy")
        observe(replace(tokens, **fields), dynamics=halves)
    assert halves.flush()[0] == pytest.approx(whole, rel=1e-6)


def test_nothing_seen_is_nothing_logged():
    assert Dynamics().flush() == ({}, {})
    tokens = batch()
    masked = replace(tokens, mask=torch.zeros_like(tokens.mask))
    assert observe(masked).flush() == ({}, {})


def test_extreme_entropies_stay_inside_the_histogram():
    tokens = batch()
    entropy = tokens.entropy.clone()
    entropy[0, 0], entropy[1, 0], entropy[2, 0] = 0.0, -1e-7, 50.0
    metrics, histograms = observe(replace(tokens, entropy=entropy)).flush()
    assert sum(histograms["entropy/hist"].counts) == tokens.mask.sum()


def _rank(rank):
    tokens = batch(rank)
    if rank == 1:
        tokens = replace(tokens, mask=tokens.mask & (torch.arange(50) < 3))
    return observe(tokens).flush()[0]


def test_two_ranks_are_one_process():
    both = Dynamics(0.5)
    for rank in range(2):
        tokens = batch(rank)
        observe(replace(tokens, mask=tokens.mask & (torch.arange(50) < 3)) if rank else tokens, dynamics=both)
    expected = both.flush()[0]
    for metrics in two_ranks(_rank):
        assert metrics == pytest.approx(expected, rel=1e-9)


def _idle(rank):
    dynamics = Dynamics(0.5 if rank == 0 else None)
    if rank == 0:
        observe(batch(0), dynamics=dynamics)
    first = dynamics.flush(torch.device("cpu"))[0]
    return first, dynamics.flush(torch.device("cpu"))[0]


def test_a_rank_that_has_seen_nothing_neither_hangs_nor_counts():
    expected = observe(batch(0)).flush()[0]
    for metrics, nothing in two_ranks(_idle):
        assert metrics == pytest.approx(expected, rel=1e-9) and nothing == {}
