import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from golden import close
from rl.errors import ConfigError
from rl.head import HiddenTap, Reference, full_kl, ranks, refuse_logit_transforms, score
from tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("m"))).eval()


def inputs(rows=3, prompt=4, completion=6):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 43, (rows, prompt + completion), generator=g)
    attention = torch.ones_like(ids)
    attention[0, :2] = 0  # left padding
    attention[1, -3:] = 0  # right padding
    return ids, attention


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_is_log_softmax_of_the_logits(model, temperature):
    ids, attention = inputs()
    forward = model.forward
    scores = score(model, ids, attention, 6, temperature)
    assert model.forward == forward  # the patch is gone
    logp = (model(input_ids=ids, attention_mask=attention).logits[:, 3:-1] / temperature).log_softmax(-1)
    valid = attention[:, 4:].bool()
    close(scores.logp[valid], logp.gather(-1, ids[:, 4:, None]).squeeze(-1)[valid].detach(), 1e-5)
    close(scores.entropy[valid], -(logp.exp() * logp).sum(-1)[valid].detach(), 1e-5)
    assert (scores.entropy[~valid] == 0).all()


def test_ranks_count_the_logits_above(model, monkeypatch):
    monkeypatch.setattr("rl.head._VOCAB", 10)  # several tiles of 43 words, the last one ragged
    monkeypatch.setattr("rl.head._TOKENS", 4)
    ids, attention = inputs()
    tap = HiddenTap(model)
    with tap:
        logits = model(input_ids=ids, attention_mask=attention).logits[:, 3:-1]
    hidden = tap.completion(6)
    expected = 1 + (logits > logits.gather(-1, ids[:, 4:, None])).sum(-1)
    assert torch.equal(ranks(hidden.flatten(0, 1), tap.head, ids[:, 4:].flatten()), expected.flatten())
    assert expected.min() >= 1 and expected.max() > 5


def test_ranks_with_ties_and_bias():
    head = nn.Linear(2, 4)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert ranks(torch.ones(4, 2), head, torch.arange(4)).tolist() == [3, 1, 1, 4]
    assert ranks(torch.ones(0, 2), head, torch.zeros(0, dtype=torch.long)).tolist() == []


def test_full_kl_and_its_gradient_are_autograds(monkeypatch):
    monkeypatch.setattr("rl.head._TOKENS", 3)
    g = torch.Generator().manual_seed(0)
    head, other = nn.Linear(8, 11, bias=False), nn.Linear(8, 11)
    hidden, reference = torch.randn(7, 8, generator=g), torch.randn(7, 8, generator=g)

    def gradients(kl_of):
        h = hidden.clone().requires_grad_()
        head.weight.grad = None
        kl = kl_of(h)
        (kl * torch.arange(7)).sum().backward()
        return kl, h.grad, head.weight.grad.clone()

    def plain(h):
        logp, ref = (head(h) / 0.7).log_softmax(-1), (other(reference) / 0.7).log_softmax(-1)
        return (logp.exp() * (logp - ref)).sum(-1)

    tiled = gradients(lambda h: full_kl(h, head, reference, other, 0.7))
    for a, b in zip(tiled, gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_stays_behind_when_the_policy_moves(model):
    import copy

    ids, attention = inputs()
    policy = copy.deepcopy(model)
    reference = Reference(policy, torch.device("cpu"))
    before = reference.hidden(ids, attention, 6).clone()
    tap = HiddenTap(policy)
    with tap:
        policy(input_ids=ids, attention_mask=attention)
    assert torch.equal(tap.completion(6), before)
    for p in policy.parameters():
        p.data.add_(0.1)
    assert torch.equal(reference.hidden(ids, attention, 6), before)
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_reference_of_adapters_is_the_model_without_them(model):
    import copy

    from peft import LoraConfig, get_peft_model

    ids, attention = inputs()
    plain = Reference(copy.deepcopy(model), torch.device("cpu")).hidden(ids, attention, 6)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    reference = Reference(adapted, torch.device("cpu"))
    torch.testing.assert_close(reference.hidden(ids, attention, 6), plain)


def test_models_that_cap_their_logits_are_refused(model):
    refuse_logit_transforms(model.config, "plugin.x")
    import copy

    config = copy.deepcopy(model.config)
    config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping=30.0"):
        refuse_logit_transforms(config, "plugin.x")
