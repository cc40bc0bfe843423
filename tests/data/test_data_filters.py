import random

import pandas as pd
import pytest
from datasets import Dataset, IterableDataset

from data.errors import DataError
from data.filters import Decontaminate, Duplicates, MaxTokens, PassRate, _hashes, _words, apply


def kept(filter, prompts, **columns):
    rows = Dataset.from_dict({"prompt": prompts, **columns})
    return apply(rows, [filter])[0]["prompt"][:]


def test_length_and_what_is_counted():
    data, dropped = apply(
        Dataset.from_dict({"prompt": ["a b c", "a", "a b"]}), [MaxTokens(lambda p: len(p.split()), 2)]
    )
    assert data["prompt"][:] == ["a", "a b"] and dropped == {"longer than 2 tokens": 1}


def test_a_stream_is_filtered_as_it_goes():
    stream = IterableDataset.from_generator(lambda: ({"prompt": p} for p in ("a b", "a")))
    data, dropped = apply(stream, [MaxTokens(lambda p: len(p.split()), 1)])
    assert dropped == {} and [row["prompt"] for row in data] == ["a"] and dropped == {"longer than 1 tokens": 1}


def test_pass_rates_from_a_column_or_from_an_evaluation(tmp_path):
    assert kept(PassRate(0.2, 0.8), ["a", "b", "c"], pass_rate=[0.0, 0.5, 1.0]) == ["b"]
    frame = pd.DataFrame({"prompt": ["a", "a", "b", "b"], "correct": [True, False, True, True]})
    frame.to_parquet(tmp_path / "eval.parquet")
    by_eval = PassRate(0.2, 0.8, rates=str(tmp_path / "eval.parquet"))
    assert kept(by_eval, ["a", "b", "c"]) == ["a"]
    assert by_eval({"prompt": [{"role": "user", "content": "b"}]}) == "with a pass rate outside 0.2 to 0.8"


def test_exact_duplicates_ignore_case_and_space_only():
    assert kept(Duplicates(), ["Find x+1.", "find  x + 1.", "Find x-1."]) == ["Find x+1.", "Find x-1."]


def test_near_duplicates_are_those_of_a_search_over_all_pairs():
    rng = random.Random(0)
    base = [[rng.choice("abcdefgh") for _ in range(rng.randint(3, 60))] for _ in range(60)]
    prompts = []
    for _ in range(300):
        words = list(rng.choice(base))
        for _ in range(rng.randint(0, 3)):
            words[rng.randrange(len(words))] = "z"
        prompts.append(" ".join(words))
    found, expected, seen = Duplicates("near", 0.7), [], []
    for prompt in prompts:
        grams = _hashes(_words(prompt))
        exact = any(_words(prompt) == _words(other) for other, _ in seen)
        near = any(len(grams & other) / len(grams | other) >= 0.7 for _, other in expected)
        if not exact and not near:
            expected.append((prompt, grams))
        seen.append((prompt, grams))
    assert kept(found, prompts) == [prompt for prompt, _ in expected] and 40 < len(expected) < 250


ASK = "Answer the question below and put the final result into a box at the very end please: "


def test_decontamination_finds_a_copied_problem_and_forgives_the_instruction():
    words = [f"w{i}" for i in range(400)]
    rng = random.Random(1)
    problems = [" ".join(rng.sample(words, 30)) for _ in range(40)]
    evaluated, training = [ASK + p for p in problems[:20]], [ASK + p for p in problems[20:]]
    copied = "Before: " + problems[3] + " After."
    short = "Compute 2+2."
    filter = Decontaminate({"math500": [*evaluated, short]}, training)
    assert kept(filter, [*training, copied, short, "Compute 2+3."]) == [*training, "Compute 2+3."]
    assert filter({"prompt": copied}) == "in common with math500"


def test_a_turn_of_phrase_of_the_training_set_is_no_contamination():
    phrase = " ".join(f"p{i}" for i in range(15))
    training = [f"problem number {i} {phrase}" for i in range(7)]
    assert kept(Decontaminate({"aime": [f"another {phrase}"]}, training), training) == training
    assert len(kept(Decontaminate({"aime": [f"another {phrase}"]}, training[:3]), [*training, "x"])) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MaxTokens(len, 0), "max_prompt_tokens=0"),
        (lambda: PassRate(0.8, 0.2), "Expected 0 <= low <= high <= 1"),
        (lambda: PassRate(0, 1, rates="/nowhere.parquet"), "does not exist"),
        (lambda: Duplicates("fuzzy"), "Expected exact, near or null"),
        (lambda: Duplicates("near", 2.0), "similarity=2.0"),
        (lambda: Decontaminate({}, n=0), "ngram=0"),
        (lambda: kept(MaxTokens(len, 1), ["aa", "bb"]), "leaves none of 2 rows: 2 longer than 1 tokens"),
        (lambda: kept(PassRate(0, 1), ["a"], pass_rate=["x"]), "column 'pass_rate' is 'x'"),
        (lambda: kept(PassRate(0, 1), ["a"]), "column 'pass_rate' is None"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_a_file_without_rates(tmp_path):
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="cannot be read: .*Expected columns prompt and correct"):
        PassRate(0, 1, rates=str(tmp_path / "x.parquet"))


def test_every_pass_over_a_stream_begins_anew():
    stream = IterableDataset.from_generator(lambda: ({"prompt": p} for p in ("a", "b", "a")))
    data, dropped = apply(stream, [Duplicates()])
    for _ in range(3):
        assert [row["prompt"] for row in data] == ["a", "b"] and dropped == {"duplicates": 1}


def test_two_sets_that_share_only_their_last_members_are_found():
    """The worst case of the search: what they have in common comes last in its order."""
    near = Duplicates("near", 0.5)
    assert not near._is_near(frozenset([*range(5), *range(10, 20)]))
    assert near._is_near(frozenset([*range(5, 10), *range(10, 20)]))  # 10 of 20
    assert not near._is_near(frozenset([*range(30, 36), *range(11, 20)]))  # 9 of 21


def test_the_instruction_of_an_evaluation_set_is_known_without_the_training_set():
    evaluated = [f"{ASK} problem {i} of the set" for i in range(30)]
    assert kept(Decontaminate({"aime": evaluated}), [f"{ASK} something else"]) == [f"{ASK} something else"]


def test_a_contaminated_problem_that_is_there_often_is_no_turn_of_phrase():
    problem = " ".join(f"w{i}" for i in range(20))
    training = [problem] * 9 + ["another one"]
    assert kept(Decontaminate({"aime": [problem]}, training), training) == ["another one"]
