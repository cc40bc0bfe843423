import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from golden import close
from rl.errors import ConfigError
from rl.scoring import HiddenTap, Reference, add_scoring, full_kl, look, refuse_logit_transforms, refuse_sharded, score
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_look_finds_the_most_likely_words(model, temperature):
    ids, attention = inputs()
    seen = look(model, ids, attention, 6, temperature, k=4)
    logp = (model(input_ids=ids, attention_mask=attention).logits[:, 3:-1] / temperature).log_softmax(-1).detach()
    valid, best = attention[:, 4:].bool(), logp.topk(4)
    assert (seen.top.ids[valid] == best.indices[valid]).all() and seen.top.ids.shape == (3, 6, 4)
    close(seen.top.logp[valid], best.values[valid], 1e-5)
    own = logp.gather(-1, ids[:, 4:, None])
    assert (seen.rank[valid] == (1 + (logp > own).sum(-1))[valid]).all()
    close(seen.logp, score(model, ids, attention, 6, temperature).logp, 1e-6)


FAMILIES = {
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "gpt2": ("GPT2Config", {"n_positions": 64}),
    "phi_bias": ("PhiConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "head_dim": 8}),
}  # fmt: skip


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    name, options = FAMILIES[request.param]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(
        vocab_size=43, intermediate_size=48, initializer_range=0.3, **sizes, **tokens, **options
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_family_scores_as_with_trls_head(family, temperature):
    """Logp, entropy and every gradient; softcaps, scales, biases and routers included."""
    ids, attention = inputs()
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :4] = -100
    found = []
    for add in (add_scoring, lambda m, t: add_fused_lm_head(m, t, outputs=("log_probs", "entropy"))):
        policy = copy.deepcopy(family)
        add(policy, temperature)
        out = policy(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + 0.3 * out.entropy.square().sum()).backward()
        assert (out.aux_loss is None) == (family.config.model_type != "qwen3_moe")
        found.append([out.log_probs, out.entropy, out.aux_loss, *(p.grad for p in policy.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_the_call_a_model_is_what_it_was(model):
    ids, attention = inputs()
    policy = copy.deepcopy(model)
    add_scoring(policy, 0.7)
    ours, theirs = (m(input_ids=ids, attention_mask=attention, labels=ids) for m in (policy, model))
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    kwargs = {"max_new_tokens": 3, "do_sample": False, "attention_mask": attention[2:]}
    assert torch.equal(policy.generate(ids[2:], **kwargs), model.generate(ids[2:], **kwargs))


def test_ranks_are_those_of_the_logits(model):
    ids, attention = inputs()
    labels = ids.masked_fill(attention == 0, -100)
    policy = copy.deepcopy(model)
    add_scoring(policy, 0.7)
    out = policy(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, with_rank=True)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    expected = 1 + (logits > logits.gather(-1, ids[:, 1:, None])).sum(-1)
    valid = labels[:, 1:] != -100
    assert torch.equal(out.rank[valid], expected[valid]) and (out.rank[~valid] == 0).all()


def test_adapters_get_their_gradient_through_the_head(model):
    ids, attention = inputs()
    grads = []
    for add in (add_scoring, lambda m, t: add_fused_lm_head(m, t, outputs=("log_probs", "entropy"))):
        torch.manual_seed(0)
        base = copy.deepcopy(model)
        add(base, 0.7)
        policy = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        out = policy(input_ids=ids, attention_mask=attention, labels=ids, fused_lm_head=True)
        out.log_probs.sum().backward()
        grads.append([p.grad for p in policy.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fp32_head_of_a_bf16_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, tied=False)).eval()
    ids, attention = inputs()
    exact, half = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16()
    exact.lm_head.float()
    for m, wide in ((exact, True), (half, False)):
        add_scoring(m, 1.0, fp32_head=wide)
    out = [m(input_ids=ids, attention_mask=attention, labels=ids, fused_lm_head=True).log_probs for m in (exact, half)]
    hidden = half.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1].float()
    logp = (hidden @ half.lm_head.weight.float().t()).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out[0], logp, rtol=1e-5, atol=1e-5)
    assert (out[1] - logp).abs().max() > 1e-4


def test_full_kl_and_its_gradient_are_autograds(monkeypatch):
    monkeypatch.setattr("rl.scoring._LOGITS", 3 * 11)  # tiles of three tokens
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
    ids, attention = inputs()
    policy = copy.deepcopy(model)
    reference = Reference(policy, torch.device("cpu"), 1.0)
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
    ids, attention = inputs()
    plain = Reference(copy.deepcopy(model), torch.device("cpu"), 1.0).hidden(ids, attention, 6)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    reference = Reference(adapted, torch.device("cpu"), 1.0)
    torch.testing.assert_close(reference.hidden(ids, attention, 6), plain)


def test_models_that_cap_their_logits_are_refused(model):
    refuse_logit_transforms(model.config, "plugin.x")
    config = copy.deepcopy(model.config)
    config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="30.0"):
        refuse_logit_transforms(config, "plugin.x")


def test_weights_that_no_rank_has_whole_are_refused_where_the_full_kl_is_needed():
    def at(stage, kind=DistributedType.DEEPSPEED):
        zero = None if stage is None else SimpleNamespace(zero_stage=stage)
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=zero), distributed_type=kind)

    refuse_sharded(at(2), "plugin.x")
    refuse_sharded(at(None, DistributedType.MULTI_GPU), "plugin.x")
    with pytest.raises(ConfigError, match=r"plugin.x needs .* by ZeRO-3\). Use ZeRO-2"):
        refuse_sharded(at(3), "plugin.x")
    with pytest.raises(ConfigError, match="by FSDP"):
        refuse_sharded(at(None, DistributedType.FSDP), "plugin.x")
