from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data import countdown
from rewards.countdown import final_answers, solved
from rl.draw import Decoding, plan, prompt_ids
from rl.errors import ConfigError
from rl.evaluate import entropy_by_quarter, entropy_profile, evaluate
from rl.scoring import score
from tiny import save_model

TOKENIZER = countdown.tokenizer()
ROWS = countdown.dataset("heldout", [3], 6, seed=0, distinct=True).to_list()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("m")))


def run(model, grader=solved, answers=final_answers, rows=ROWS, **kwargs):
    options = {"samples": 4, "ks": (1, 2, 4), "seed": 0, **kwargs}
    decoding = options.pop("decoding", Decoding(max_new_tokens=8, batch_size=8))
    return evaluate(model, TOKENIZER, rows, grader, answers, decoding, **options)


def test_the_same_seed_gives_the_same_samples_and_nothing_else_is_disturbed(model):
    model.train()
    state = torch.get_rng_state()
    first, second, other = run(model), run(model), run(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert first.metrics == second.metrics
    assert first.samples["completion"].tolist() == second.samples["completion"].tolist()
    assert first.samples["completion"].tolist() != other.samples["completion"].tolist()


def test_metrics_follow_from_the_samples(model):
    """With a grader that accepts even lengths, whatever the model writes."""

    def even(prompts, completions, **columns):
        assert len(columns["numbers"]) == len(prompts) == len(completions)
        return [float(len(c.split()) % 2 == 0) for c in completions]

    result = run(model, grader=even, answers=lambda texts: [str(len(t)) if len(t) % 3 else None for t in texts])
    frame, metrics = result.samples, result.metrics
    assert len(frame) == 24 and frame.groupby("problem")["sample"].apply(list).tolist() == [[0, 1, 2, 3]] * 6
    assert frame["correct"].tolist() == [len(c.split()) % 2 == 0 for c in frame["completion"]]
    assert metrics["pass@1"] == pytest.approx(metrics["avg@4"]) == pytest.approx(frame["correct"].mean())
    assert metrics["pass@4"] == pytest.approx(frame.groupby("problem")["correct"].any().mean())
    for name in ("pass@1", "pass@2", "pass@4", "maj@2", "maj@4", "avg@4", "greedy"):
        assert 0 <= metrics[f"{name}/low"] <= metrics[name] <= metrics[f"{name}/high"] <= 1
    assert metrics["len"] == frame["tokens"].mean() and metrics["extracted"] == frame["answer"].notna().mean()
    flat = np.concatenate(frame["token_entropy"].tolist())
    assert metrics["entropy/mean"] == pytest.approx(flat.mean()) and len(flat) == frame["tokens"].sum()
    assert {"maj@2", "maj@4", "greedy"} <= set(metrics) and "maj@1" not in metrics


def test_entropies_are_those_of_the_policy_at_the_sampling_temperature(model):
    frame = run(model, decoding=Decoding(max_new_tokens=8, temperature=0.7, batch_size=8)).samples
    row = frame.iloc[5]
    ids = prompt_ids(TOKENIZER, row["prompt"])
    new = TOKENIZER(row["completion"])["input_ids"]
    full = torch.tensor([ids + new])
    alone = score(model, full, torch.ones_like(full), len(new), 0.7).entropy[0].tolist()
    assert row["token_entropy"][: len(new)] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    "name, value", [("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("min_new_tokens", 8), ("min_p", 0.5)]
)
def test_a_models_own_generation_defaults_do_not_change_what_is_sampled(model, monkeypatch, name, value):
    """Hub models bring such defaults; with them the samples would not be those of the policy that is scored."""
    plain = run(model)
    monkeypatch.setattr(model.generation_config, name, value)
    assert run(model).samples["completion"].tolist() == plain.samples["completion"].tolist()
    assert getattr(model.generation_config, name) == value  # and the model keeps them


def test_adapters_are_sampled_without_the_models_defaults_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))  # starts as the identity
    plain = run(adapted).samples["completion"].tolist()
    model.generation_config.repetition_penalty = 3.0
    assert run(adapted).samples["completion"].tolist() == plain
    assert adapted.generation_config.repetition_penalty == model.generation_config.repetition_penalty == 3.0


def test_every_end_the_model_declares_ends_a_completion_as_in_training(model, monkeypatch):
    words = Counter(" ".join(run(model).samples["completion"]).split())
    word = words.most_common(1)[0][0]
    other = TOKENIZER.convert_tokens_to_ids(word)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [TOKENIZER.eos_token_id, other])
    frame = run(model).samples
    texts = [text.split() for text in frame["completion"]]
    assert any(word in text for text in texts)
    for text, row in zip(texts, frame.itertuples(), strict=True):
        if word in text:
            assert text.index(word) == len(text) - 1 and not row.truncated
            assert len(row.token_entropy) == row.tokens


def test_without_any_end_of_text_every_completion_is_truncated(model, monkeypatch):
    tokenizer = countdown.tokenizer()
    tokenizer.eos_token = None
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    decoding = Decoding(max_new_tokens=4, batch_size=8)
    frame = evaluate(model, tokenizer, ROWS, solved, final_answers, decoding, samples=2, ks=(1,)).samples
    assert frame["truncated"].all() and (frame["tokens"] == 4).all()


@pytest.mark.parametrize("samples, batch_size, largest", [(4, 8, 8), (5, 8, 5), (20, 8, 8)])
def test_no_batch_is_larger_than_asked(model, monkeypatch, samples, batch_size, largest):
    sizes, generate = [], model.generate

    def spy(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    decoding = Decoding(max_new_tokens=4, batch_size=batch_size)
    frame = run(model, decoding=decoding, samples=samples, ks=(1,), greedy=False).samples
    assert max(sizes) == largest and sum(sizes) == samples * len(ROWS)
    assert frame.groupby("problem")["sample"].apply(list).tolist() == [list(range(samples))] * len(ROWS)


def test_batches_draw_different_samples(model):
    """One problem in four batches of two: with one random state for all of them each would draw the same two."""
    decoding = Decoding(max_new_tokens=8, batch_size=2)
    frame = run(model, rows=ROWS[:1], decoding=decoding, samples=8, ks=(1,), greedy=False).samples
    pairs = [tuple(frame["completion"][i : i + 2]) for i in range(0, 8, 2)]
    assert len(set(pairs)) == 4


def test_truncation_and_end_of_text(model):
    frame = run(model).samples
    assert (frame["tokens"] <= 8).all() and frame[frame["truncated"]]["tokens"].eq(8).all()
    for row in frame[~frame["truncated"]].itertuples():
        assert row.tokens == len(row.completion.split()) + 1  # the end itself is a token of the policy


def test_chat_prompts_go_through_the_template(model):
    tokenizer = countdown.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} : {% endfor %}"
    assert prompt_ids(tokenizer, [{"role": "user", "content": "3 4 > 7"}]) == tokenizer("3 4 > 7 : ")["input_ids"]


def test_entropy_profile():
    profile = entropy_profile(np.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert profile["entropy/mean"] == 0.2 and profile["entropy/top20_mean"] == 1.0 and profile["entropy/p50"] == 0.0


def test_entropy_by_quarter():
    """Of five tokens two are a quarter; a single token is both the first and the last."""
    quarters = entropy_by_quarter([np.array([1.0, 2.0, 9.0, 3.0, 4.0]), np.array([6.0])])
    assert quarters == {"entropy/first_quarter": 3.0, "entropy/last_quarter": pytest.approx(13 / 3)}


def test_strict_grades_stand_beside_the_default_ones(model):
    def graded(least):
        return lambda prompts, completions, **columns: [float(len(c) >= least) for c in completions]

    def found(least):
        return lambda texts: ["x" if len(t) >= least else None for t in texts]

    lengths = run(model).samples["completion"].str.len()
    low, high = lengths.quantile(0.2), lengths.quantile(0.7)
    assert low < high
    result = run(model, graded(low), found(low), strict_grader=graded(high), strict_answers=found(high))
    m, frame = result.metrics, result.samples
    assert m["pass@1"] == pytest.approx((lengths >= low).mean()) and m["extracted"] == (lengths >= low).mean()
    assert m["strict/pass@1"] == pytest.approx((lengths >= high).mean()) and m["strict/pass@1"] < m["pass@1"]
    assert m["strict/extracted"] == (lengths >= high).mean()
    assert m["strict/pass@1/low"] < m["strict/pass@1"] < m["strict/pass@1/high"]
    assert frame["strict_correct"].tolist() == (lengths >= high).tolist()
    assert not [name for name in run(model).metrics if name.startswith("strict")]


@pytest.mark.parametrize("filter", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}])
def test_filters_of_the_distribution_act(model, filter):
    """Each of these leaves the most likely token only: what is sampled is then what is greedy."""
    decoding = Decoding(max_new_tokens=8, batch_size=8, **filter)
    filtered = run(model, decoding=decoding, samples=1, ks=(1,), greedy=False).samples
    greedy = run(model, decoding=decoding.greedy(), samples=1, ks=(1,), greedy=False).samples
    assert filtered["completion"].tolist() == greedy["completion"].tolist()
    assert run(model, samples=1, ks=(1,)).samples["completion"].tolist() != greedy["completion"].tolist()


def test_typical_sampling_acts(model):
    decoding = Decoding(max_new_tokens=8, batch_size=8, typical_p=1e-6)
    one = run(model, decoding=decoding, samples=4, greedy=False).samples
    assert one.groupby("problem")["completion"].nunique().tolist() == [1] * 6  # a single token is left each time
    assert run(model).samples.groupby("problem")["completion"].nunique().max() > 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.1}, "eval.temperature=-0.1 does not work. Expected a number of at least 0"),
        ({"temperature": float("nan")}, "eval.temperature=nan"),
        ({"temperature": "hot"}, "eval.temperature=hot"),
        ({"top_p": 0.0}, "eval.top_p=0.0 does not work. Expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "eval.top_p=1.1"),
        ({"top_p": None}, "eval.top_p=None"),
        ({"top_k": -1}, "eval.top_k=-1"),
        ({"top_k": 2.5}, "eval.top_k=2.5 does not work. Expected a whole number"),
        ({"top_k": True}, "eval.top_k=True"),
        ({"min_p": 1}, "eval.min_p=1"),
        ({"typical_p": 0}, "eval.typical_p=0"),
        ({"batch_size": 0}, "eval.batch_size=0"),
        ({"max_new_tokens": 0}, "eval.max_new_tokens=0"),
        ({"temperature": 0, "top_p": 0.9}, "eval.temperature=0 is greedy, eval.top_p=0.9 would do nothing"),
        ({"temperature": 0, "min_p": 0.1}, "eval.min_p=0.1 would do nothing"),
    ],
    ids=str,
)
def test_decoding_refuses(values, message):
    with pytest.raises(ConfigError) as error:
        Decoding(**{"max_new_tokens": 4, **values})
    assert message in str(error.value)


@pytest.mark.parametrize("batch_size, samples", [(8, 4), (8, 5), (3, 7), (1, 1), (100, 2)])
def test_every_sample_is_planned_once(batch_size, samples):
    lengths = [3, 1, 2, 2, 9]
    planned = [(p, n) for batch in plan(lengths, batch_size, samples) for p in batch.problems for n in batch.numbers]
    assert sorted(planned) == [(p, n) for p in range(5) for n in range(samples)]


def test_adapters_loaded_from_a_folder_are_evaluated(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    whole = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base"))
    get_peft_model(whole, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapters")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert run(loaded).samples["completion"].tolist() == run(again).samples["completion"].tolist()


def test_refuses(model):
    with pytest.raises(ConfigError, match="no problem"):
        run(model, rows=[])
    with pytest.raises(ConfigError, match="eval.ks=.1, 8. does not fit eval.samples=4"):
        run(model, ks=(1, 8))
