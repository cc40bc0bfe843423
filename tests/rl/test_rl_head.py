"""The head against float64 autograd on full logits."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import linear

from rl import head, kernel
from rl.head import EXTRAS, LogitRule, head_stats
from rl.tiles import Moments


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many ragged tiles, so that every seam between two of them is crossed."""
    monkeypatch.setattr("rl.tiles.TILE", (7, 16))
    monkeypatch.setattr(head, "_KEPT", 4 * 53 * 4)  # four tokens at a time where the gradient is formed in the forward


def case(n=23, vocab=53, width=12, bias=True, dtype=torch.float64, seed=0, sharp=1.0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (n,), generator=g)
    return sharp * randn(n, width), randn(vocab, width), randn(vocab) if bias else None, targets


def textbook(hidden, weight, bias, targets, rule=LogitRule(), top_k=3):  # noqa: B008
    logits = linear(hidden, weight, bias) * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logp = (logits / rule.temperature).log_softmax(-1)
    p, finite = logp.exp(), logp.masked_fill(logp == -math.inf, 0.0)
    entropy, top = -(p * finite).sum(-1), logp.topk(min(top_k, logp.shape[1])).values
    at_1 = logits.log_softmax(-1)
    rows = torch.arange(len(targets))
    return head.HeadStats(
        logp[rows, targets],
        entropy,
        1 + (logits > logits[rows, targets][:, None]).sum(-1),
        top[:, 0],
        top[:, 0] - top[:, 1],
        (p * (finite + entropy[:, None]) ** 2).sum(-1),
        top.exp().sum(-1),
        -(at_1.exp() * at_1.masked_fill(at_1 == -math.inf, 0.0)).sum(-1),
    )


def gradients(stats, inputs, g_logp, g_entropy):
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return torch.autograd.grad((stats.logp * g_logp).sum() + (stats.entropy * g_entropy).sum(), wanted)


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def upstream(n, share=0.4, seed=1):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, n, generator=g) < share
    return torch.randn(2, n, generator=g, dtype=torch.float64) * keep


def compare(hidden, weight, bias, targets, rule=LogitRule(), gs=None, tol=1e-10, **options):  # noqa: B008
    gs = upstream(len(targets)) if gs is None else gs
    ours, theirs = (
        leaves(hidden, weight, bias),
        leaves(*(None if x is None else x.double() for x in (hidden, weight, bias))),
    )
    found = head_stats(ours[0], ours[1], targets, bias=ours[2], rule=rule, extras=EXTRAS, top_k=3, **options)
    expected = textbook(*theirs, targets, rule)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
    pairs = zip(gradients(found, ours, *gs.to(hidden.dtype)), gradients(expected, theirs, *gs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol * (1 + b.abs().sum().item()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab", [2, 16, 53, 64])
@pytest.mark.parametrize(
    "rule", [LogitRule(), LogitRule(0.7), LogitRule(1.3, 0.5), LogitRule(0.7, 2.0, 3.0)], ids=lambda r: str(tuple(r))
)
def test_statistics_and_gradients_are_autograds(rule, vocab, bias):
    compare(*case(vocab=vocab, bias=bias), rule)


@pytest.mark.parametrize("vocab", [53, 64])
def test_fp32(vocab):
    compare(*case(vocab=vocab, dtype=torch.float32), LogitRule(0.7), tol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peaked_and_large_logits_over_a_ragged_vocabulary(dtype):
    """Logits beyond +-200: a sum that is not about the running maximum overflows."""
    hidden, weight, bias, targets = case(vocab=61, sharp=30.0, dtype=dtype)
    logits = linear(hidden, weight, bias)
    assert logits.abs().max() > 200
    compare(hidden, weight, bias, targets, tol=1e-9 if dtype == torch.float64 else 1e-4)


def test_negative_control(monkeypatch):
    """Forgetting to move the sums to the new maximum is noticed."""
    monkeypatch.setattr("rl.tiles._shift", lambda *sums: None)
    with pytest.raises(AssertionError):
        compare(*case())


def test_a_wrong_gradient_is_noticed(monkeypatch):
    from rl.tiles import LogitGradient

    right = LogitGradient.fill
    monkeypatch.setattr(
        LogitGradient, "fill", lambda self, rows, y, *rest: (right(self, rows, y, *rest), y.mul_(1.001))
    )
    with pytest.raises(AssertionError):
        compare(*case())


def test_ties_share_the_best_rank_and_the_target_never_counts_itself():
    hidden = torch.ones(4, 1)
    weight = torch.tensor([[1.0], [3.0], [3.0], [0.0]])
    assert head_stats(hidden, weight, torch.arange(4), extras=("rank",)).rank.tolist() == [3, 1, 1, 4]
    equal = torch.zeros(40, 1)
    stats = head_stats(torch.ones(40, 1), equal, torch.arange(40), extras=("rank", "margin"))
    assert (stats.rank == 1).all() and (stats.margin == 0).all()
    torch.testing.assert_close(stats.entropy, torch.full((40,), math.log(40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_agree_with_the_logits_of_the_same_products(dtype):
    hidden, weight, _, targets = case(n=60, vocab=500, bias=False, dtype=dtype)
    logits = (hidden @ weight.t()).float()
    expected = 1 + (logits > logits.gather(-1, targets[:, None])).sum(-1)
    found = head_stats(hidden, weight, targets, extras=("rank",)).rank
    assert (found - expected).abs().max() <= 1 and (found == expected).float().mean() > 0.9  # a dot product's last bit


def test_a_token_with_logit_minus_infinity_has_no_probability():
    hidden, weight, bias, targets = case()
    bias[[3, 40]] = -math.inf
    targets[targets == 3] = 4
    targets[targets == 40] = 4
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    found, expected = head_stats(ours[0], ours[1], targets, bias=ours[2]), textbook(*theirs, targets)
    torch.testing.assert_close((found.logp, found.entropy), (expected.logp, expected.entropy))
    for g in gradients(found, ours, *upstream(23)):
        assert g.isfinite().all()
    targets[0] = 3
    assert head_stats(hidden, weight, targets, bias=bias).logp[0] == -math.inf


@pytest.mark.parametrize("n", [0, 1])
def test_one_and_no_token(n):
    compare(*case(n=n), gs=torch.ones(2, n, dtype=torch.float64))


def test_all_gradients_zero_is_a_differentiable_zero_and_costs_no_product(monkeypatch):
    inputs = case()
    ours = leaves(*inputs[:3])
    stats = head_stats(ours[0], ours[1], inputs[3], bias=ours[2])
    monkeypatch.setattr(torch, "mm", None)  # any product would fail
    for g in gradients(stats, ours, torch.zeros(23), torch.zeros(23)):
        assert not g.any()


def test_backward_computes_live_tokens_only(monkeypatch):
    inputs = case()
    ours = leaves(*inputs[:3])
    g_logp, g_entropy = torch.zeros(23, dtype=torch.float64), torch.zeros(23, dtype=torch.float64)
    g_logp[[2, 20]] = 1.0
    g_entropy[[20, 22]] = 1.0
    stats = head_stats(ours[0], ours[1], inputs[3], bias=ours[2])
    seen, right = [], head._backward
    monkeypatch.setattr(head, "_backward", lambda hidden, *rest: (seen.append(len(hidden)), right(hidden, *rest))[1])
    gradients(stats, ours, g_logp, g_entropy)
    assert seen == [3]


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.7, 2.0, 3.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradient_known_beforehand(rule, share, monkeypatch):
    gs = upstream(23, share)
    gs[1] = 0.0
    monkeypatch.setattr(head, "_backward", None)  # nothing is computed again
    compare(*case(), rule, gs=gs, gradient=-2.5 * gs[0])


@pytest.mark.parametrize("hint", ["none", "right", "wrong"])
def test_the_weight_is_gathered_once_each_way_whatever_this_ranks_tokens_do(hint):
    entered = []

    @contextmanager
    def gathered(*parameters):
        entered.append(len(parameters))
        yield

    gs = upstream(23)
    gs[1] = 0.0
    gradient = {"none": None, "right": gs[0], "wrong": gs[0] + 0.1}[hint]
    compare(*case(), gs=gs, gradient=gradient, gathered=gathered)
    assert entered == [2, 2]


def test_a_wrong_hint_changes_no_gradient():
    gs = upstream(23)
    compare(*case(), gs=gs, gradient=gs[0])  # the entropy has a gradient as well
    gs[1] = 0.0
    compare(*case(), gs=gs, gradient=gs[0] + 0.1)
    compare(*case(), gs=gs, gradient=torch.zeros(23, dtype=torch.float64))
    compare(*case(), gs=torch.zeros_like(gs), gradient=gs[0])


def test_tied_weights_get_both_gradients():
    hidden, weight, _, targets = case(bias=False)
    embedded = torch.randint(0, 53, (23,))
    grads = []
    for function in (lambda h, w: head_stats(h, w, targets), lambda h, w: textbook(h, w, None, targets)):
        w = weight.clone().requires_grad_()
        stats = function(hidden + w[embedded], w)
        grads.append(gradients(stats, [w], *upstream(23))[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = case()
    ours = leaves(*inputs[:3])
    ours[frozen].requires_grad_(False)
    theirs = [x.clone().requires_grad_(x.requires_grad) for x in ours]
    stats = head_stats(ours[0], ours[1], inputs[3], bias=ours[2])
    gs = upstream(23)
    for a, b in zip(gradients(stats, ours, *gs), gradients(textbook(*theirs, inputs[3]), theirs, *gs), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_is_as_close_as_full_bf16_logits():
    hidden, weight, _, targets = case(n=200, vocab=300, width=64, bias=False, dtype=torch.bfloat16)
    exact = textbook(hidden.double(), weight.double(), None, targets)
    rounded = textbook((hidden @ weight.t()).double(), torch.eye(300).double(), None, targets)
    found = head_stats(hidden, weight, targets)
    for a, b, c in ((found.logp, rounded.logp, exact.logp), (found.entropy, rounded.entropy, exact.entropy)):
        assert (a.double() - c).abs().max() <= 1.1 * (b - c).abs().max() + 1e-6


def test_autocast_decides_the_products():
    hidden, weight, _, targets = case(bias=False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head_stats(hidden, weight, targets)
    expected = head_stats(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(half.logp, expected.logp) and half.logp.dtype == torch.float32


def test_no_tensor_of_tokens_by_vocabulary():
    """The largest temporary is a tile, in the forward and in the backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
            return out

    hidden, weight, _, targets = case(n=600, vocab=700, bias=False)
    ours = leaves(hidden, weight)
    with Largest() as seen:
        stats = head_stats(*ours, targets, extras=EXTRAS)
        gradients(stats, ours, *upstream(600, 0.02))
    assert seen.size <= 2 * weight.numel() < 600 * 700 // 20


class Emulated:
    """The GPU's path on a CPU: TRL's kernel runs its torch tiles there."""

    @pytest.fixture(autouse=True)
    def on(self, monkeypatch):
        monkeypatch.setattr(kernel, "usable", lambda hidden: True)


class TestKernel(Emulated):
    @pytest.mark.parametrize("rule", [LogitRule(0.7), LogitRule(0.7, 2.0, 3.0)], ids=["plain", "softcap"])
    def test_with_rows_chosen_in_between(self, rule):
        compare(*case(dtype=torch.float32), rule, tol=3e-5)

    def test_nothing_live(self):
        compare(*case(dtype=torch.float32), gs=torch.zeros(2, 23, dtype=torch.float64), tol=3e-5)

    def test_the_kernel_gets_the_live_rows_only(self, monkeypatch):
        seen, right = [], kernel.backward
        monkeypatch.setattr(
            kernel, "backward", lambda ctx, saved, *r: (seen.append(len(saved[0])), right(ctx, saved, *r))[1]
        )
        gs = torch.zeros(2, 23, dtype=torch.float64)
        gs[0, :4] = 1.0
        compare(*case(dtype=torch.float32), gs=gs, tol=3e-5)
        assert seen == [4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    hidden, weight, bias, targets = (x.cuda() for x in case(n=300, vocab=1000, width=64, dtype=dtype))
    torch.backends.cuda.matmul.allow_tf32 = False
    found = head_stats(hidden, weight, targets, bias=bias, extras=EXTRAS)
    expected = textbook(*(x.double() for x in (hidden, weight, bias)), targets)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.logp.double(), expected.logp, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=tolerance, atol=tolerance)


def test_moments_of_extras_cost_nothing_unless_asked():
    tiles = head.Tiles(torch.zeros(3, 2), LogitRule(), 4, 4)
    plain = Moments(tiles, (), 10, None)
    assert plain.s2 is None and plain.hot0 is None and plain.top is None and plain.above is None
