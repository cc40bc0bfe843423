"""Masked statistics: against plain torch on the selected values, and two ranks against one process."""

import math

import pytest
import torch

from ranks import two_ranks
from rl import reduce
from rl.reduce import Reduce, count_kept

QS = (0.0, 0.1, 0.5, 0.8, 1.0)


def case(seed, rows=5, columns=7):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return x, torch.rand(rows, columns, generator=g) < 0.6


@pytest.mark.parametrize("seed", range(20))
def test_micro_scope_is_torch_on_the_selected_values(seed):
    x, mask = case(seed)
    r, values = Reduce(mask), x[mask]
    assert torch.allclose(r.mean(x, "micro"), values.mean())
    assert r.max(x, "micro") == values.max() and r.min(x, "micro") == values.min()
    for q in QS:
        assert r.quantile(x, q, "micro") == torch.quantile(values, q)
    for fraction in (0.05, 0.2, 0.5, 1.0):
        chosen = r.topk(x, fraction, "micro")
        k = math.ceil(len(values) * fraction - 1e-4)
        assert chosen.sum() == k and torch.equal(x[chosen].sort().values, values.topk(k).values.sort().values)


@pytest.mark.parametrize("seed", range(20))
def test_response_scope_is_micro_scope_row_by_row(seed):
    x, mask = case(seed)
    mask[0] = True
    r = Reduce(mask)
    for i in range(len(x)):
        row = Reduce(mask[i : i + 1])
        one = x[i : i + 1]
        if not mask[i].any():
            assert r.quantile(x, 0.5, "response")[i].isnan() and not r.topk(x, 0.5, "response")[i].any()
            continue
        assert r.mean(x, "response")[i] == row.mean(one, "micro") and r.max(x, "response")[i] == row.max(one, "micro")
        for q in QS:
            assert torch.allclose(r.quantile(x, q, "response")[i], row.quantile(one, q, "micro"), rtol=0, atol=1e-15)
        assert torch.equal(r.topk(x, 0.4, "response")[i], row.topk(one, 0.4, "micro")[0])


def test_ties_keep_exactly_k_the_first_ones():
    x, mask = torch.ones(1, 6), torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    for scope in ("micro", "response"):
        assert Reduce(mask).topk(x, 0.4, scope).tolist() == [[False, True, True, False, False, False]]


def test_count_kept_is_the_official_rule():
    for n in range(1, 200):
        for fraction in (0.1, 0.2, 0.3, 0.5, 1.0):
            assert count_kept(n, fraction) == max(1, int(n * fraction + 0.9999))
    assert count_kept(0, 0.2) == 0


def test_quantile_of_more_values_than_torch_takes(monkeypatch):
    values = torch.randn(1001)
    expected = [torch.quantile(values, q) for q in QS]
    monkeypatch.setattr(reduce, "_QUANTILE_LIMIT", 100)
    assert torch.allclose(torch.stack([reduce.quantile(values, q) for q in QS]), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_select_is_the_sorted_value(dtype):
    g = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.randn(300, generator=g, dtype=dtype).exp() * 10.0 ** torch.randint(-20, 20, (300,), generator=g),
            -torch.rand(200, generator=g, dtype=dtype),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, 1.0, 1.0], dtype=dtype),
        ]
    )
    ordered = values.sort().values
    assert all(reduce.select(values, k, everywhere=False) == ordered[k] for k in range(len(values)))


def test_empty_scopes():
    x, mask = torch.ones(2, 3), torch.zeros(2, 3).bool()
    r = Reduce(mask)
    for scope in ("response", "micro", "world"):
        assert (r.mean(x, scope) == 0).all() and (r.max(x, scope) == -math.inf).all()
        assert r.quantile(x, 0.5, scope).isnan().all() and not r.topk(x, 0.5, scope).any()


def test_rollout_scope_needs_the_recorded_values():
    x, mask = case(0)
    with pytest.raises(ValueError, match="rollout_entropy"):
        Reduce(mask).quantile(x, 0.5, "rollout")
    pool = torch.arange(11.0)
    assert Reduce(mask).quantile(x, 0.5, "rollout", rollout=pool) == 5
    assert torch.equal(Reduce(mask).topk(x * 10, 0.3, "rollout", rollout=pool), (x * 10 >= 7) & mask)


def test_results_carry_no_gradient():
    x, mask = case(0)
    x.requires_grad_()
    r = Reduce(mask)
    assert not any(t.requires_grad for t in (r.mean(x, "micro"), r.max(x, "response"), r.quantile(x, 0.5, "micro")))


def _statistics(rank, x, mask):
    x, mask = x[rank], mask[rank]
    r = Reduce(mask)
    quantiles = torch.stack([r.quantile(x, q, "world") for q in QS])
    return r.mean(x, "world"), r.max(x, "world"), r.min(x, "world"), quantiles, r.topk(x, 0.3, "world")


@pytest.mark.parametrize("empty_rank", [None, 0, 1])
def test_world_scope_on_two_ranks_is_one_process(empty_rank):
    """Ragged counts, one rank without a single token included."""
    x, mask = case(3, rows=6)
    mask[:3] &= torch.rand(3, 7) < 0.4
    if empty_rank is not None:
        mask[3 * empty_rank : 3 * empty_rank + 3] = False
    whole = Reduce(mask)
    ranks = two_ranks(_statistics, x.view(2, 3, 7), mask.view(2, 3, 7))
    for mean, largest, smallest, quantiles, _ in ranks:
        assert torch.allclose(mean, whole.mean(x, "micro"))
        assert largest == whole.max(x, "micro") and smallest == whole.min(x, "micro")
        assert torch.equal(quantiles, torch.stack([whole.quantile(x, q, "micro") for q in QS]))
    assert torch.equal(torch.cat([r[4] for r in ranks]), whole.topk(x, 0.3, "micro"))


def _ties(rank, x):
    r = Reduce(torch.ones_like(x[rank], dtype=torch.bool))
    return r.topk(x[rank], 0.5, "world"), r.topk(x[rank], 0.5, "rollout", x[rank].flatten())


def test_ties_over_ranks_keep_exactly_k_the_first_ranks_ones():
    x = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]]).view(2, 1, 3)
    (first, all_first), (second, all_second) = two_ranks(_ties, x)
    assert first.tolist() == [[True, True, True]] and second.tolist() == [[False, False, False]]
    assert all_first.all() and all_second.tolist() == [[True, False, True]]  # the rollout's threshold keeps all ties


def _sizes(rank, x):
    import torch.distributed as dist

    seen, right = [], dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: (seen.append(t.numel()), right(t, *a, **k))[1]
    dist.all_gather = None  # nothing is gathered
    r = Reduce(torch.ones_like(x[rank], dtype=torch.bool))
    threshold = r.quantile(x[rank], 0.8, "world")
    own = r.quantile(x[rank], 0.8, "rollout", rollout=x[rank].flatten())
    return threshold, own, torch.tensor(seen).sum()


@pytest.mark.parametrize("n", [10, 100_000])
def test_thresholds_cost_the_same_communication_for_any_number_of_tokens(n):
    x = torch.rand(2, 1, n, generator=torch.Generator().manual_seed(0))
    (one, own, sent), (other, other_own, _) = two_ranks(_sizes, x)
    assert one == other == own == other_own == torch.quantile(x, 0.8)
    assert sent == 2 * (1 + 2 * (2048 + 2048 + 1024))
