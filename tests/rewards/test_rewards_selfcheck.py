"""The self-check finds parsers that are wrong in one way each."""

import re
import time

import pytest

from rewards.errors import RewardError
from rewards.math_answer import math_answer
from rewards.selfcheck import check

GOLDS = ["18", "1000", "43,500", r"\frac{1}{2}", "3/4", r"10\%", "ellipse", "7", "-3", "2500", "x+1", "12"]
ROWS = [{"prompt": f"p{i}", "answer": gold} for i, gold in enumerate(GOLDS * 3)]


def boxed(text):
    found = re.findall(r"\\boxed\{\s*((?:[^{}]|\{[^{}]*\})*?)\s*\}", text)
    return found[-1] if found else None


def literal(prompts, completions, answer, **columns):
    """Only the very same text counts."""
    return [float(boxed(c) == a) for c, a in zip(completions, answer, strict=True)]


def always(prompts, completions, **columns):
    return [1.0] * len(completions)


def generous_to_silence(prompts, completions, answer, **columns):
    return [1.0 if not c else s for c, s in zip(completions, math_answer(prompts, completions, answer), strict=True)]


def inverted(prompts, completions, answer, **columns):
    return [1 - s for s in math_answer(prompts, completions, answer)]


def slow(prompts, completions, answer, **columns):
    time.sleep(0.6 if len(completions) == 1 else 0)
    return math_answer(prompts, completions, answer)


def test_a_sound_reward_has_no_problem():
    found = check(math_answer, ROWS)
    assert list(found.problems()) == [] and found.worst == () and found.unparsed == 0.0
    assert {share for _, share in found.right.values()} == {1.0} and found.empty == found.wrong == 0.0
    assert found.right["1,000"][0] == 9 and found.right["per cent"][0] == 3 and found.right["a/b"][0] == 6
    text = "\n".join(found.lines())
    assert "right, as units" in text and "p99" in text and len(list(found.lines())) <= 40


@pytest.mark.parametrize(
    "reward, said",
    [
        (literal, ["score 1 as '1,000'", "score 1 as 'units'", "Row 2: '"]),
        (always, ["empty completions score above 0", "100% of another row's answers"]),
        (generous_to_silence, ["100% of the empty completions"]),
        (inverted, ["0% of 36 right answers score 1 as 'boxed'", "100% of another row's"]),
        (slow, ["one sample takes 0."]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_broken_parser_is_told_apart(reward, said):
    found = check(reward, ROWS[:12] if reward is slow else ROWS)
    problems = " ".join(found.problems())
    assert all(part in problems for part in said), problems
    assert len(found.worst) <= 10 and len(list(found.lines())) <= 40


def test_a_set_with_solutions_of_its_own():
    rows = [{"prompt": str(i), "answer": "?", "secret": f"s{i}"} for i in range(5)]

    def exact(prompts, completions, secret, **columns):
        return [float(c == s) for c, s in zip(completions, secret, strict=True)]

    found = check(exact, rows, solution=lambda row: row["secret"])
    assert found.right == {"the set's solution": (5, 1.0)} and found.wrong == 0.0 and not list(found.problems())
    assert list(check(exact, rows, solution=lambda row: "x").problems())[0].startswith("0% of 5 right answers")


def test_chats_are_given_as_chats():
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "answer": "4"},
        {"prompt": [{"role": "user", "content": "r"}], "answer": "5"},
    ]
    assert check(math_answer, rows).right["boxed"] == (2, 1.0)


def test_what_cannot_be_checked():
    with pytest.raises(RewardError, match="only be checked on rows with an answer"):
        check(always, [{"prompt": "p"}])
    with pytest.raises(RewardError, match="only be checked on rows"):
        check(always, [])
