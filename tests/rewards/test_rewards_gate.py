"""A reward that counts only where another one does."""

from rewards.checked import Checked
from rewards.gate import Gated, Once


def of(values, calls=None):
    def reward(prompts, completions, **columns):
        if calls is not None:
            calls.append(len(completions))
        return list(values)

    return Checked("name", reward)


def test_a_gate_sets_what_is_below_it_to_zero_and_says_how_many():
    series = {}
    gated = Gated(of([1.0, 2.0, -3.0, -4.0]), of([0.5, 0.4, 1.0, -1.0]), least=0.5)
    assert gated(["p"] * 4, list("abcd"), log_metric=series.__setitem__) == [1.0, 0.0, -3.0, 0.0]
    assert series == {"reward/name/gated": 0.5} and gated.__name__ == "name"


def test_a_gate_is_computed_once_for_all_who_ask():
    calls = []
    gate = Once(of([1.0, 0.0], calls))
    first, second = Gated(of([5.0, 5.0]), gate, 0.5), Gated(of([7.0, 7.0]), gate, 0.5)
    completions = ["a", "b"]
    assert [f(["p"] * 2, completions) for f in (gate, first, second)] == [[1.0, 0.0], [5.0, 0.0], [7.0, 0.0]]
    assert calls == [2]
    gate(["p"] * 2, ["a", "b"])  # equal texts of a later step are another call
    assert calls == [2, 2]


def test_nobody_can_change_what_is_kept():
    gate, completions = Once(of([1.0])), ["a"]
    gate(["p"], completions)[0] = 9.0
    assert gate(["p"], completions) == [1.0]


def test_the_wish_for_logp_comes_through():
    wants = of([1.0])
    wants.needs_logp = True
    assert (
        Once(wants).needs_logp and Gated(of([1.0]), wants, 0.5).needs_logp and Gated(wants, of([1.0]), 0.5).needs_logp
    )
    assert not Gated(of([1.0]), Once(of([1.0])), 0.5).needs_logp
