"""The generalised next-token loss against hand-computed numbers, and a short warm start."""

import math

import pytest
import torch
import torch.nn.functional as F

from golden import close, tensor
from rl.warmstart import batches, collate, next_token_loss, warm_start

LOGITS = [[2, 1, 0, -1, -2], [0.2, 1.5, 0.7, -0.5, 0], [0.1, 0, -0.3, 0.4, -1]]
LABELS = torch.tensor([1, 1, 4])

GOLDEN = {
    (0.0, 0.0, 0.0): ([1.451914395938, 0.732524708598, 2.548773111294], 1.5777374052765847),
    (-0.25, 0.0, 0.0): ([1.552033403700, 0.862911805904, 2.601173694605], 1.67203963473622),
    (0.5, 0.0, 0.0): ([1.270635268764, 0.527878547953, 2.447117505044], 1.4152104405871413),
    (0.0, 0.0, -0.1): ([1.464861365556, 0.762856357368, 2.585766984843], 1.6044949025890463),
    (0.0, 0.1, 0.0): ([1.388273531282, 0.710925741859, 2.493584737073], 1.5309280034046189),
    (-0.25, 0.1, -0.1): ([1.501339508663, 0.871644487935, 2.582979193932], 1.6519877301767163),
    (0.5, 0.1, -0.1): ([1.219941373727, 0.536611229984, 2.428923004372], 1.395158536027637),
    (0.0, 0.1, 0.1): ([1.375326561663, 0.680594093089, 2.456590863525], 1.5041705060921575),
}


@pytest.mark.parametrize("values", GOLDEN, ids=str)
def test_golden_values(values):
    beta, head, tail = values
    per_position, mean = GOLDEN[values]
    for i in range(3):
        close(next_token_loss(tensor(LOGITS[i : i + 1]), LABELS[i : i + 1], beta, head, tail, k=2), per_position[i])
    close(next_token_loss(tensor(LOGITS), LABELS, beta, head, tail, k=2), mean)


def test_golden_gradient():
    logits = tensor(LOGITS).requires_grad_()
    next_token_loss(logits, LABELS, -0.25, 0.1, -0.1, k=2).backward()
    close(logits.grad[0], [0.216304786581, -0.268940710776, 0.035015572520, 0.012881509251, 0.004738842425])
    close(logits.grad[1], [0.055426378470, -0.205312922028, 0.076983337982, 0.027523924991, 0.045379280585])
    close(logits.grad[2], [0.073491347732, 0.080664957215, 0.059758070075, 0.099202943017, -0.313117318039])


def random_case(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 9, generator=g, dtype=torch.float64), torch.randint(0, 9, (4, 6), generator=g)


def gradient(loss_of, logits):
    logits = logits.clone().requires_grad_()
    loss = loss_of(logits)
    loss.backward()
    return loss, logits.grad


def test_without_shaping_it_is_cross_entropy():
    logits, labels = random_case()
    labels[0, :3] = -100
    ours, grad = gradient(lambda z: next_token_loss(z, labels), logits)
    theirs, expected = gradient(lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()), logits)
    close(ours, theirs.item(), 1e-12)
    close(grad, expected, 1e-12)


@pytest.mark.parametrize("beta", [-0.25, 0.0, 0.5])
def test_the_closed_form_is_the_enumerated_expectation(beta):
    """sum_a sg(p_a r_a) ln p_a over all actions a has the same gradient as the closed form."""
    logits, labels = random_case(1)
    head, tail, k = 0.1, -0.2, 3

    def enumerated(z):
        logp = z.log_softmax(-1)
        p = logp.detach().exp()
        top = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0)
        reward = head * top + tail * (1 - top)
        p_x = p.gather(-1, labels[..., None])
        reward = reward.scatter(-1, labels[..., None], (1 - p_x) ** beta / p_x)
        return -(p * reward * logp).sum(-1).mean()

    _, grad = gradient(lambda z: next_token_loss(z, labels, beta, head, tail, k), logits)
    close(grad, gradient(enumerated, logits)[1], 1e-12)
    close(grad.sum(-1), torch.zeros(4, 6), 1e-12)


def test_equal_lambdas_are_cross_entropy_with_another_coefficient():
    logits, labels = random_case(2)
    _, grad = gradient(lambda z: next_token_loss(z, labels, 0.0, 0.1, 0.1, k=3), logits)

    def scaled(z):
        logp_x = z.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return -((1 - 0.1 * logp_x.detach().exp()) * logp_x).mean()

    close(grad, gradient(scaled, logits)[1], 1e-12)


def test_head_and_tail_at_the_extremes_of_k():
    logits, labels = random_case(3)
    whole = next_token_loss(logits, labels, lam_head=0.1, lam_tail=5.0, k=9)
    close(whole, next_token_loss(logits, labels, lam_head=0.1, k=9).item(), 1e-12)
    none = next_token_loss(logits, labels, lam_head=5.0, lam_tail=0.1, k=0)
    close(none, next_token_loss(logits, labels, lam_tail=0.1, k=0).item(), 1e-12)


def test_no_label_is_a_differentiable_zero():
    loss, grad = gradient(lambda z: next_token_loss(z, torch.full((4, 6), -100), -0.25, 0.1, 0.1), random_case()[0])
    assert loss.item() == 0 and (grad == 0).all()


def test_batches_cover_every_example_once_an_epoch():
    examples = [([i], [i] * (1 + i % 5)) for i in range(20)]
    epoch = [e[0][0] for _, batch in zip(range(5), batches(examples, 4, seed=0), strict=False) for e in batch]
    assert sorted(epoch) == list(range(20)) and epoch != list(range(20))


def test_collate_labels_completions_only():
    ids, labels = collate([([1, 2], [3]), ([4], [5, 6, 7])])
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert labels.tolist() == [[-100, -100, 3, -100], [-100, 5, 6, 7]]


def test_a_short_warm_start_learns_and_repeats_itself():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import warmstart

    examples = warmstart.demonstrations([3], 1500, noise=0.0, seed=0)

    def losses():
        return warm_start(warmstart.build_model(seed=0), examples, steps=60, batch_size=32, warmup_steps=10)

    first = losses()
    assert first[0] == pytest.approx(math.log(43), abs=0.2)  # an untrained model knows nothing of 43 words
    assert sum(first[-5:]) / 5 < 0.55 * first[0]
    assert losses() == first
