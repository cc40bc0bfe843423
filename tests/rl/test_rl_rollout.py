"""The native sampler draws what ``generate`` draws, and records what a second forward would find."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl.errors import ConfigError
from rl.plugins.fork_mask import ForkMask
from rl.plugins.rank_shaping import RankShaping
from rl.rollout import NativeSampler, Truncation, draw
from rl.scoring import add_scoring, score
from rl.sparsity import Savings, Trim
from tiny import EntropyTrainer, assert_same, grpo_config, make_trainer, save_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**k)),
    "llama_yarn": lambda **k: LlamaForCausalLM(
        LlamaConfig(**k, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})
    ),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**k)),
    "qwen3": lambda **k: Qwen3ForCausalLM(Qwen3Config(**k, head_dim=16)),
}
PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13], [8], [20, 21]]


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param](vocab_size=43, **SIZES).eval()


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]] * 3, [[4]]], ids=["ragged", "equal", "one token"])
def test_greedy_is_generate(model, prompts):
    ids, attention = padded(prompts)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=[2, 30, 31, 32, 33])
    expected = model.generate(ids, attention_mask=attention, generation_config=config)[:, ids.shape[1] :]
    drawn = draw(model, prompts, max_new_tokens=12, ends=[2, 30, 31, 32, 33], pad=0, temperature=0.0)
    assert torch.equal(drawn.ids, expected)


def test_an_fp32_head_tied_to_the_embedding_of_a_bf16_model():
    """As TRL's cast_lm_head_to_fp32 leaves it: the first parameter's dtype is not that of the layers."""
    model = FAMILIES["qwen3"](vocab_size=43, **{**SIZES, "tie_word_embeddings": True}).eval().bfloat16()
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.bfloat16())
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    drawn = draw(model, PROMPTS, max_new_tokens=5, ends=[2], pad=0)
    ids, attention = padded(PROMPTS)
    both = torch.cat([ids, drawn.ids], 1), torch.cat([attention, drawn.mask.long()], 1)
    logits = model(input_ids=both[0], attention_mask=both[1]).logits[:, ids.shape[1] - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, drawn.ids[..., None]).squeeze(-1) * drawn.mask
    torch.testing.assert_close(drawn.recorded.logp, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_record_is_what_a_second_forward_finds(model, temperature):
    torch.manual_seed(0)
    ends = [2, *range(30, 36)]  # so that completions end at different places
    drawn = draw(model, PROMPTS * 5, max_new_tokens=15, ends=ends, pad=0, temperature=temperature, rank=True)
    lengths = drawn.mask.sum(-1)
    assert lengths.min() < 5 < lengths.max()
    ids, attention = padded(PROMPTS * 5)
    both = torch.cat([ids, drawn.ids], 1), torch.cat([attention, drawn.mask.long()], 1)
    found = score(model, *both, drawn.ids.shape[1], temperature)
    torch.testing.assert_close(drawn.recorded.logp, found.logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.recorded.entropy, found.entropy, rtol=1e-4, atol=1e-5)
    logits = model(input_ids=both[0], attention_mask=both[1]).logits[:, ids.shape[1] - 1 : -1]
    rank = 1 + (logits > logits.gather(-1, drawn.ids[..., None])).sum(-1)
    assert torch.equal(drawn.recorded.rank, rank * drawn.mask)
    for row, mask in zip(drawn.ids, drawn.mask, strict=True):
        ended = torch.isin(row[mask], torch.tensor(ends))
        assert not ended[:-1].any() and (ended[-1] or mask.all()) and not row[~mask].any()


def chi_square(counts, p):
    """In standard deviations from its mean, near enough normal for dozens of outcomes."""
    n, likely = counts.sum(), p * counts.sum() >= 5
    pooled = [torch.cat([x[likely], x[~likely].sum()[None]]) for x in (counts, n * p)]
    seen, expected = (x[pooled[1] > 0] for x in pooled)
    statistic, free = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    return float((statistic - free) / (2 * free) ** 0.5)


VOCAB, DRAWS = 6, 20_000
CUTS = {
    "whole": Truncation(),
    "top_k": Truncation(top_k=3),
    "top_p": Truncation(top_p=0.8),
    "min_p": Truncation(min_p=0.05),
}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, head_dim=16, **SIZES)).eval()


@torch.no_grad()
def law(model, prompt, temperature, cut):
    """Probability of every pair of tokens, (vocabulary, vocabulary), by transformers' own warpers on full logits."""
    pairs = torch.tensor([[*prompt, a] for a in range(VOCAB)])
    logits = model(pairs).logits[:, -2:] / temperature
    first, second = (cut.warpers()(None, z).softmax(-1).double() for z in (logits[:1, 0], logits[:, 1]))
    return first.T * second


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_law_of_the_samples(small, cut, temperature):
    torch.manual_seed(0)
    prompts = [[3, 4], [5]]  # two, so that there is padding as well
    options = {"max_new_tokens": 2, "ends": [], "pad": 0, "temperature": temperature, "truncation": cut}
    drawn = draw(small, [p for p in prompts for _ in range(DRAWS)], **options).ids.view(2, DRAWS, 2)
    for prompt, ids in zip(prompts, drawn, strict=True):
        counts = torch.bincount(ids[:, 0] * VOCAB + ids[:, 1], minlength=VOCAB**2).double()
        assert abs(chi_square(counts, law(small, prompt, temperature, cut).flatten())) < 4
    if cut == CUTS["whole"]:  # the test can tell a wrong temperature
        assert chi_square(counts, law(small, prompt, 1.2 * temperature, cut).flatten()) > 10


def test_a_token_without_probability_is_never_drawn(small):
    biased = Qwen3ForCausalLM(small.config).eval()
    biased.load_state_dict(small.state_dict())
    right = biased.lm_head.forward
    biased.lm_head.forward = lambda x: right(x).index_fill(-1, torch.tensor([0, 3, 5]), -torch.inf)
    drawn = draw(biased, [[4]] * 500, max_new_tokens=4, ends=[], pad=0)
    assert set(drawn.ids.flatten().tolist()) == {1, 2, 4} and drawn.recorded.entropy.isfinite().all()


def test_adapters_are_part_of_the_policy(model):
    torch.manual_seed(0)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    adapted = get_peft_model(copy, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    ids, attention = padded(PROMPTS)
    drawn = draw(adapted, PROMPTS, max_new_tokens=8, ends=[2], pad=0)
    both = torch.cat([ids, drawn.ids], 1), torch.cat([attention, drawn.mask.long()], 1)
    found = score(adapted, *both, drawn.ids.shape[1])
    torch.testing.assert_close(drawn.recorded.logp, found.logp, rtol=1e-4, atol=1e-5)


def test_same_seed_same_completions(model):
    def once():
        torch.manual_seed(3)
        return draw(model, PROMPTS, max_new_tokens=6, ends=[2], pad=0)

    assert torch.equal(once().ids, once().ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"no_repeat_ngram_size": 2}},
        {"cache_implementation": "static"},
    ],
)
def test_what_it_does_not_do_is_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=next(iter(changes)) + ".*rollout=hf"):
        NativeSampler(Qwen3Config(), grpo_config(tmp_path, **changes))


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(num_hidden_layers=1, use_sliding_window=True, sliding_window=4, max_window_layers=0),
        LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        GPT2Config(),
    ],
    ids=["window", "dynamic", "other"],
)
def test_models_it_does_not_know_are_refused(tmp_path, config):
    with pytest.raises(ConfigError, match="rollout=hf"):
        NativeSampler(config, grpo_config(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class TestInTraining:
    def train(self, folder, tmp_path, plugins, savings=True, **changes):
        config = Qwen3Config.from_pretrained(folder)
        needs = frozenset().union(*(p.needs for p in plugins.values())) if plugins else frozenset()
        sampler = NativeSampler(config, grpo_config(tmp_path, **changes), rank="rank" in needs)
        calls = []

        class Counting(EntropyTrainer):
            def _forward_ahead(self, *args):
                calls.append(1)
                return super()._forward_ahead(*args)

        trainer = make_trainer(Counting, folder, tmp_path, plugins, extra={"sampler": sampler}, **changes)
        if not savings:
            trainer.savings, trainer.trim = Savings(), Trim(False, False)
        trainer.train()
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, len(calls)

    @pytest.mark.parametrize(
        "changes", [{}, {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}], ids=["on", "off"]
    )
    @pytest.mark.parametrize(
        "plugins", [{}, {"m": ForkMask(rho=0.3)}, {"r": RankShaping(lam_tail=-0.1, k=3)}], ids=["plain", "mask", "rank"]
    )
    def test_the_mask_known_beforehand_trains_as_the_one_in_the_pass(self, folder, tmp_path, plugins, changes):
        ahead, calls = self.train(folder, tmp_path, plugins, **changes)
        whole, none = self.train(folder, tmp_path, plugins, savings=False, **changes)
        assert calls > 0 == none
        assert_same(ahead, whole)

    def test_truncated_completions_that_are_masked(self, folder, tmp_path):
        changes = {"mask_truncated_completions": True, "max_completion_length": 4}
        ahead, _ = self.train(folder, tmp_path, {"m": ForkMask()}, **changes)
        whole, _ = self.train(folder, tmp_path, {"m": ForkMask()}, savings=False, **changes)
        assert_same(ahead, whole)


def test_a_scored_model_still_decodes(model):
    """add_scoring patches the forward; the sampler reads the layers below it."""
    torch.manual_seed(0)
    plain = draw(model, PROMPTS, max_new_tokens=4, ends=[2], pad=0, temperature=0.0)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    add_scoring(copy, 1.0)
    assert torch.equal(draw(copy, PROMPTS, max_new_tokens=4, ends=[2], pad=0, temperature=0.0).ids, plain.ids)
