from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset

from data.errors import DataError
from data.mixture import mix, order

SIZES, WEIGHTS = {"a": 5, "b": 3, "c": 7}, {"a": 1.0, "b": 2.5, "c": 0.5}


def test_every_prefix_holds_the_shares_within_one():
    counts, total = Counter(), sum(WEIGHTS.values())
    for position, (name, _) in enumerate(islice(order(SIZES, WEIGHTS, seed=0), 500), 1):
        counts[name] += 1
        assert all(abs(counts[n] - position * w / total) <= 1 for n, w in WEIGHTS.items())


def test_each_pass_over_a_set_is_another_permutation():
    rows = [row for name, row in islice(order(SIZES, WEIGHTS, seed=0), 300) if name == "b"]
    passes = [tuple(rows[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(p) == [0, 1, 2] for p in passes) and len(set(passes)) > 2


def test_it_goes_on_exactly_from_any_position_and_depends_on_the_seed():
    whole = list(islice(order(SIZES, WEIGHTS, seed=4), 100))
    assert list(islice(order(SIZES, WEIGHTS, seed=4, start=37), 63)) == whole[37:]
    assert list(islice(order(SIZES, WEIGHTS, seed=5), 100)) != whole


def test_the_mixed_set_names_its_sources_and_keeps_the_columns_all_have():
    a = Dataset.from_list([{"prompt": f"a{i}", "answer": str(i), "level": i} for i in range(4)])
    b = Dataset.from_list([{"prompt": f"b{i}", "answer": str(i)} for i in range(2)])
    mixed = mix({"a": a, "b": b}, {"b": 3.0}, seed=0, size=8)
    assert mixed.column_names == ["prompt", "answer", "source"]
    assert Counter(mixed["source"]) == {"a": 2, "b": 6}
    assert all(row["prompt"] == row["source"] + row["answer"] for row in mixed)
    assert len(mix({"a": a, "b": b}, {}, seed=0)) == 6


@pytest.mark.parametrize(
    "sets, weights, message",
    [
        ({"a": ["x"]}, {"b": 1.0}, "differ in b"),
        ({"a": ["x"]}, {"a": -1.0}, "are no shares"),
        ({"a": ["x"]}, {"a": 0.0}, "are no shares"),
        ({"a": ["x"]}, {"a": "three"}, "are no shares"),
        ({"a": ["x"]}, {"a": float("inf")}, "are no shares"),
        ({"a": ["x"]}, 3, "data.weights=3 is no map"),
        ({"a": ["x"], "b": [[{"role": "user", "content": "x"}]]}, {}, "two kinds .a: text, b: chat."),
    ],
)
def test_what_is_refused(sets, weights, message):
    with pytest.raises(DataError, match=message):
        mix({name: Dataset.from_dict({"prompt": p}) for name, p in sets.items()}, weights, seed=0)
