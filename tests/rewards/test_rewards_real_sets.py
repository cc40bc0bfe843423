"""Every gold answer of the real sets: right against itself in several spellings, wrong against another row's."""

import random
import re
from pathlib import Path

import pandas as pd
import pytest

from rewards.math_answer import math_answer
from rewards.math_grading import is_read
from rewards.selfcheck import SPELLINGS

SHARED = Path(__file__).parents[3] / "shared" / "datasets"
SETS = ["gsm8k_test", "math500", "DAPO-Math-17k", "aime24", "aime25", "amc23", "minerva_math", "olympiadbench"]
MUST_PARSE = {"gsm8k_test", "math500", "aime24", "aime25", "amc23"}  # less than 1 % unread by math-verify alone

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")

# beside those of the self-check, spellings that fit every answer
ALWAYS = {
    "answer line": "Some working.\nAnswer: ${}$",
    "tag": "<think>hm</think> <answer>{}</answer>",
    "displaystyle": r"\boxed{{\displaystyle {}}}",
    "full stop": r"The final answer is \boxed{{{}.}}",
}


def golds(name):
    frame = pd.read_parquet(SHARED / f"{name}.parquet")["reward_model"]
    return list(dict.fromkeys(row["ground_truth"] for row in frame))


def number(gold):
    try:
        return float(re.sub(r"[,\\%$]", "", gold))
    except ValueError:
        return None


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_score_one_in_every_spelling_that_applies(name):
    found = golds(name)
    spelt = [(gold, spell(gold)) for gold in found for spell in SPELLINGS.values()]
    spelt += [(gold, form.format(gold)) for gold in found for form in ALWAYS.values()]
    spelt = [(gold, text) for gold, text in spelt if text is not None]
    scores = math_answer([""] * len(spelt), [text for _, text in spelt], [gold for gold, _ in spelt], timeout=20)
    assert [pair for pair, score in zip(spelt, scores, strict=True) if score != 1.0] == []
    assert len(spelt) >= 7 * len(found)


@pytest.mark.parametrize("name", SETS)
def test_another_rows_gold_scores_zero_unless_equal(name):
    found = golds(name)
    random.Random(0).shuffle(found)
    pairs = list(zip(found, found[1:] + found[:1], strict=True))
    scores = math_answer([""] * len(pairs), [rf"\boxed{{{b}}}" for _, b in pairs], [a for a, _ in pairs], timeout=20)
    same = [number(a) is not None and number(a) == number(b) for a, b in pairs]
    assert [p for p, s, e in zip(pairs, scores, same, strict=True) if s != e] == []


@pytest.mark.parametrize("name", SETS)
def test_share_that_math_verify_does_not_read(name):
    found = golds(name)
    unread = [gold for gold in found if not is_read(gold)]
    assert len(unread) < 0.01 * len(found) if name in MUST_PARSE else len(unread) < 0.05 * len(found)
