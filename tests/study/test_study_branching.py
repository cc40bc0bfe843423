"""What a branch is worth, against the whole tree of completions; intervals, places, and what cannot be branched."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from data import countdown
from rewards.countdown import final_answers, solved
from rl.draw import Decoding, prompt_ids
from rl.errors import ConfigError
from rl.estimators import wilson_interval
from rl.paths import find_model
from rl.study.branching import Options, draw_completion, study

END = 2
CUT = 5e-5


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(find_model("builtin:countdown")).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return countdown.tokenizer()


def rows(level, count):
    return countdown.dataset("heldout", [level], count, seed=0, distinct=True).to_list()


def grader(row):
    def grade(texts):
        columns = {"numbers": [row["numbers"]] * len(texts), "target": [row["target"]] * len(texts)}
        return [g >= 0.5 for g in solved([row["prompt"]] * len(texts), texts, **columns)]

    return grade


def studied(model, tokenizer, row, decoding, options, grade=True):
    prompt = prompt_ids(tokenizer, row["prompt"])
    completion = draw_completion(model, tokenizer, prompt, decoding, options.seed)
    judge = grader(row) if grade else None
    return prompt, completion, study(model, tokenizer, prompt, completion, decoding, options, final_answers, judge)


def probabilities(model, prefixes, temperature=1.0, top_p=1.0):
    """(N, V) of the next word behind prefixes of one length, in plain terms: softmax, then the nucleus."""
    with torch.no_grad():
        p = (model(torch.tensor(prefixes)).logits[:, -1].double() / temperature).softmax(-1)
    sorted_p, order = p.sort(descending=True)
    outside = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, sorted_p.cumsum(-1) - sorted_p >= top_p)
    p = p.masked_fill(outside, 0)
    return p / p.sum(-1, keepdim=True)


def exact_values(model, tokenizer, prompt, roots, length, grade, **decoding):
    """(low, high) probability of success behind each root, by going through the tree of its continuations.

    The tree is walked level by level; a path of less probability than CUT is not followed, and its probability is what low and
    high differ by.
    """
    ended = [[] for _ in roots]  # (completion, probability)
    lost = [0.0] * len(roots)
    front = [(i, root, 1.0) for i, root in enumerate(roots)]
    for width in range(length + 1):
        here, front = [x for x in front if len(x[1]) == width], [x for x in front if len(x[1]) != width]
        for i, ids, p in [x for x in here if x[1][-1:] == [END] or width == length]:
            ended[i].append((ids, p))
        here = [x for x in here if x[1][-1:] != [END] and width < length]
        if here:
            words = probabilities(model, [prompt + ids for _, ids, _ in here], **decoding)
            for (i, ids, p), row in zip(here, words, strict=True):
                kept = (row * p >= CUT).nonzero().flatten().tolist()
                lost[i] += p * (1 - float(row[kept].sum()))
                front += [(i, [*ids, word], p * float(row[word])) for word in kept]
    values = []
    for leaves, missing in zip(ended, lost, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in leaves]
        good = sum(p for right, (_, p) in zip(grade(texts), leaves, strict=True) if right)
        values.append((good, good + missing))
    return values


def chance_of_cover(n, rate):
    """That the interval of n samples has the true rate in it."""
    inside = [k for k in range(n + 1) if wilson_interval(k, n)[0] <= rate <= wilson_interval(k, n)[1]]
    log = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in inside]
    rate = min(max(rate, 1e-12), 1 - 1e-12)
    return sum(math.exp(c + k * math.log(rate) + (n - k) * math.log1p(-rate)) for c, k in zip(log, inside, strict=True))


def meets(estimate, bounds):
    return estimate.low <= bounds[1] and bounds[0] <= estimate.high


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["as trained", "cooler and cut"])
def test_intervals_cover_the_value_of_the_whole_tree(model, tokenizer, how):
    decoding = Decoding(max_new_tokens=14, batch_size=4096, **how)
    covered, expected, variance, count, missed = 0, 0.0, 0.0, 0, 0
    for number, row in enumerate(rows(3, 4)):
        options = Options(tokens=3, branches=3, samples=100, seed=number)
        prompt, completion, found = studied(model, tokenizer, row, decoding, options)
        shown = [(f.place, b) for f in found.forks for b in f.branches if b.token is not None and not b.over]
        roots = [[*completion[:place], b.token] for place, b in shown]
        roots += [completion[: f.place] for f in found.forks] + [[]]
        values = exact_values(model, tokenizer, prompt, roots, 14, grader(row), **how)
        assert max(high - low for low, high in values) < 0.03
        for (_, b), bounds in zip(shown, values, strict=False):
            chance = chance_of_cover(b.n, sum(bounds) / 2)
            covered, count = covered + meets(b.value, bounds), count + 1
            expected, variance = expected + chance, variance + chance * (1 - chance)
            assert abs(b.value.value - sum(bounds) / 2) < 5 * 0.5 / math.sqrt(b.n)
        prefixes = [*(f.value for f in found.forks), found.start]
        missed += sum(not meets(v, bounds) for v, bounds in zip(prefixes, values[len(shown) :], strict=True))
    assert count >= 20
    assert abs(covered - expected) < 3 * math.sqrt(variance) + 1  # as many as the binomial distribution says
    assert missed <= 3  # of 16


def test_branches_are_words_of_the_decoding(model, tokenizer):
    row = rows(4, 1)[0]
    for how in ({}, {"temperature": 0.8, "top_p": 0.95}, {"top_k": 2}):
        prompt, completion, found = studied(
            model, tokenizer, row, Decoding(20, **how), Options(tokens=4, branches=4, samples=2)
        )
        for fork in found.forks:
            if "top_k" in how:
                assert len(fork.branches) == 2 and sum(b.prob for b in fork.branches) == pytest.approx(1)
                continue
            p = probabilities(model, [prompt + completion[: fork.place]], **how)[0]
            for b in fork.branches:
                if b.token is not None:
                    assert b.prob == pytest.approx(float(p[b.token]), abs=1e-5)
            words = [b for b in fork.branches if b.token is not None]
            assert [b.taken for b in words].count(True) == 1 and words == sorted(words, key=lambda b: -b.prob)


def test_places_are_those_of_highest_entropy_in_the_order_of_the_text(model, tokenizer):
    _, completion, found = studied(model, tokenizer, rows(4, 1)[0], Decoding(20), Options(tokens=3, samples=2))
    places = [f.place for f in found.forks]
    assert places == sorted(places) and len(places) == 3 and len(found.entropy) == len(completion)
    assert min(found.entropy[p] for p in places) >= max(h for i, h in enumerate(found.entropy) if i not in places)
    assert all(f.entropy == found.entropy[f.place] for f in found.forks)


def test_the_taken_word_is_among_the_branches_however_unlikely(model, tokenizer):
    row = rows(4, 1)[0]
    prompt = prompt_ids(tokenizer, row["prompt"])
    odd = [*tokenizer("31 : : 5")["input_ids"], END]
    found = study(model, tokenizer, prompt, odd, Decoding(20), Options(tokens=5, branches=2, samples=2), final_answers)
    for fork in found.forks:
        words = [b for b in fork.branches if b.token is not None]
        assert len(words) == 2 and [b.token for b in words if b.taken] == [odd[fork.place]]
        assert sum(b.prob for b in fork.branches) == pytest.approx(1, abs=2e-3)  # with all others together


def test_the_value_is_the_mean_of_the_branches_and_gains_cancel(model, tokenizer):
    _, _, found = studied(model, tokenizer, rows(3, 3)[2], Decoding(14), Options(tokens=3, samples=16))
    assert not any(b.over for f in found.forks for b in f.branches)
    for fork in found.forks:
        total = sum(b.prob for b in fork.branches)
        assert fork.value.value == pytest.approx(sum(b.prob * b.value.value for b in fork.branches) / total)
        assert sum(b.prob * b.gain.value for b in fork.branches) == pytest.approx(0, abs=1e-9)
        shown = [b.value.value for b in fork.branches if b.token is not None]
        assert fork.spread == max(shown) - min(shown)
        assert all(b.gain.low <= b.gain.value <= b.gain.high for b in fork.branches)
        for b in fork.branches:
            assert b.right == sum(s.right for s in b.samples) and b.n == len(b.samples) == 16
            assert (b.value.low, b.value.high) == wilson_interval(b.right, 16) and b.value.value == b.right / 16


def test_a_word_that_ends_the_completion_has_an_exact_value(model, tokenizer):
    row = {"prompt": "1 2 > 3 :", "numbers": "1 2", "target": 3}
    prompt = prompt_ids(tokenizer, row["prompt"])
    right = [*tokenizer("1 + 2 = 3")["input_ids"], END]
    options = Options(tokens=6, branches=3, samples=4)
    found = study(model, tokenizer, prompt, right, Decoding(20), options, final_answers, grader(row))
    (end,) = [b for b in found.forks[-1].branches if b.token == END]
    assert found.right and end.over and end.taken and end.n == 1
    assert (end.value.low, end.value.value, end.value.high) == (1.0, 1.0, 1.0)
    # as long as the decoding allows: the last word ends it as well, truncated
    short = study(model, tokenizer, prompt, right[:3], Decoding(3), options, final_answers, grader(row))
    assert short.truncated and all(
        b.over and b.samples[0].truncated for b in short.forks[-1].branches if b.token != END and b.token is not None
    )
    assert all(len(s.text.split()) <= 3 - f.place for f in short.forks for b in f.branches for s in b.samples)


def test_without_a_grader_the_most_frequent_answer_counts(model, tokenizer):
    _, _, found = studied(model, tokenizer, rows(3, 1)[0], Decoding(14), Options(tokens=2, samples=32), grade=False)
    assert found.measure == "majority" and found.majority.count("=") == 2
    taken = [b for f in found.forks for b in f.branches]
    assert all(b.right == dict(b.answers).get(found.majority, 0) for b in taken if b.distinct <= 3)
    assert all(len(b.answers) <= 3 and b.distinct >= len(b.answers) for b in taken)

    prompt = prompt_ids(tokenizer, rows(3, 1)[0]["prompt"])
    completion = draw_completion(model, tokenizer, prompt, Decoding(14), 0)
    none = study(
        model, tokenizer, prompt, completion, Decoding(14), Options(2, 2, 4), lambda texts: [None] * len(texts)
    )
    assert none.measure == "unknown" and none.right is None and math.isnan(none.start.value)
    assert all(math.isnan(f.spread) and math.isnan(b.gain.value) for f in none.forks for b in f.branches)


def test_the_same_seed_gives_the_same_study_and_the_model_is_left_alone(model, tokenizer):
    state = torch.random.get_rng_state()
    one, two, other = (
        studied(model, tokenizer, rows(3, 1)[0], Decoding(14), Options(tokens=2, samples=8, seed=seed))[2]
        for seed in (0, 0, 1)
    )
    assert one == two and one.forks != other.forks
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_cannot_be_branched_is_refused(model, tokenizer):
    words, prompt = tokenizer("1 + 2 = 3")["input_ids"], tokenizer("1 2 > 3 :")["input_ids"]

    def refused(match, prompt=prompt, completion=words, temperature=1.0, top_k=0, **options):
        with pytest.raises(ConfigError, match=match):
            decoding = Decoding(20, temperature, top_k=top_k)
            study(model, tokenizer, prompt, completion, decoding, Options(**options), final_answers)

    refused("prompt has no tokens", prompt=[])
    refused("ends at once", completion=[END])
    refused("more than the 43 words", branches=44)
    refused("temperature=0 is greedy", temperature=0.0)
    refused("one word at every place", top_k=1)
    refused("forks.samples=1", samples=1)
    refused("forks.branches=1", branches=1)
    refused("forks.tokens=0", tokens=0)
    refused("forks.tokens=True", tokens=True)
    refused("or null", max_new_tokens=0)
