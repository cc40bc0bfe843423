import itertools
import random

import pytest

from data import countdown
from data.errors import DataError
from rewards.countdown import verdict


def take(n, *args):
    return list(itertools.islice(countdown.problems(*args), n))


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    assert take(50, "train", [3], 1) == take(50, "train", [3], 1) != take(50, "train", [3], 2)


def test_train_and_heldout_are_disjoint_whatever_the_order_of_the_numbers():
    def keys(split):
        return {(tuple(sorted(p.numbers)), p.target) for p in take(5000, split, [3], 0)}

    train, heldout = keys("train"), keys("heldout")
    assert not train & heldout
    assert 0.05 < len(heldout) / (len(train) + len(heldout)) < 0.15


def test_levels_are_cycled():
    assert [len(p.numbers) for p in take(6, "train", [3, 4], 0)] == [3, 4] * 3


@pytest.mark.parametrize("level", [2, 3, 4])
def test_every_problem_is_solved_by_a_demonstration_without_noise(level):
    rng = random.Random(0)
    for problem in take(50, "train", [level], 0):
        text = countdown.demonstration(rng, problem, noise=0.0)
        assert verdict(" ".join(map(str, problem.numbers)), problem.target, text) == "ok"


def test_noise_makes_some_demonstrations_miss_the_target_and_nothing_worse():
    rng = random.Random(0)
    verdicts = [
        verdict(" ".join(map(str, p.numbers)), p.target, countdown.demonstration(rng, p, noise=0.5))
        for p in take(300, "train", [3], 0)
    ]
    assert set(verdicts) <= {"ok", "target", "unused"}  # unused: no legal step was left
    assert 0.2 < verdicts.count("ok") / 300 < 0.95


def test_rows_and_distinct_rows():
    data = countdown.dataset("heldout", [3], 60, seed=0, distinct=True)
    assert data.column_names == ["prompt", "answer", "numbers", "target", "level"]
    assert len({(tuple(sorted(r["numbers"].split())), r["target"]) for r in data}) == 60
    row = data[0]
    assert row["prompt"] == f"{row['numbers']} > {row['target']} :" and row["answer"] == str(row["target"])


def test_every_word_is_a_token_of_its_own_and_decodes_back():
    tokenizer = countdown.tokenizer()
    for problem in take(20, "train", [4], 0):
        text = f"{problem.prompt} {countdown.demonstration(random.Random(0), problem, 0.2)}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.padding_side == "left" and tokenizer("never seen")["input_ids"] == [3, 3]


@pytest.mark.parametrize(
    "args, message",
    [
        (("test", [3], 5, 0), "train or heldout"),
        (("train", [], 5, 0), "levels"),
        (("train", [9], 5, 0), "2 to 6"),
        (("train", [3], 0, 0), "at least 1"),
        (("heldout", [2], 500, 0, True), "distinct"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(DataError, match=message):
        countdown.dataset(*args)
