"""The n-gram penalty, by hand."""

import pytest

from rewards.errors import RewardError
from rewards.repetition import Repetition


def score(text, ids=(), **settings):
    return Repetition(**settings)(["p"], [text], completion_ids=[list(ids)])[0]


def test_words():
    assert score("a b a b a", n=2) == -0.5  # ab ba ab ba: 2 of 4 are new
    assert score("A b\na  B a", n=2) == -0.5  # case and white space do not matter
    assert score("a b a b a", n=2, max_penalty=0.2) == -0.1
    assert score("a a a a a a", n=3) == -0.75  # aaa four times
    assert score("one two three four", n=3) == 0


def test_tokens():
    assert score("x", ids=[7, 8, 7, 8, 7], n=2, by="tokens") == -0.5


@pytest.mark.parametrize("text", ["", "a", "a a"])
def test_short_texts_are_free(text):
    assert score(text, n=3) == 0


def test_chat_completions():
    chat = [[{"role": "assistant", "content": "a b a b a"}]]
    assert Repetition(n=2)(["p"], chat, completion_ids=[[]]) == [-0.5]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"n": 0}, "n=0"),
        ({"n": True}, "n=True"),
        ({"max_penalty": -1}, "max_penalty=-1 does not work. Expected a number from 0"),
        ({"by": "letters"}, "by='letters' is not known. Expected one of: words, tokens"),
    ],
)
def test_repetition_refuses(setting, message):
    with pytest.raises(RewardError, match=f"reward.repetition.fn.{message}"):
        Repetition(**setting)
