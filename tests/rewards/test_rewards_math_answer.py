import threading
from pathlib import Path

import pytest

from rewards.math_answer import equal, final_answers, math_answer

SHARED = Path(__file__).parents[3] / "shared" / "datasets"


@pytest.mark.parametrize(
    "gold, text",
    [
        ("18", r"so the answer is \boxed{18}."),
        ("1/2", r"we get $\frac{1}{2}$"),
        (r"\frac{14}{3}", r"\boxed{14/3}"),
        ("1000", r"\boxed{1,000}"),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"Thus $\boxed{(3, \frac{\pi}{2})}$"),
    ],
)
def test_equal_in_other_spellings(gold, text):
    assert equal(gold, text)


@pytest.mark.parametrize(
    "gold, text", [("18", r"\boxed{19}"), ("18", ""), ("18", "no number here"), ("1/2", r"\boxed{2}")]
)
def test_not_equal(gold, text):
    assert not equal(gold, text)


def test_the_reward_also_works_outside_the_main_thread():
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(math_answer(["p", "p"], [r"\boxed{4}", [{"content": "5"}]], answer=["4", "4"]))
    )
    thread.start()
    thread.join()
    assert got == [1.0, 0.0]


def test_final_answer_is_canonical():
    texts = [r"first 3, then \boxed{42}", "it is 42", "no answer"]
    assert final_answers(texts) == ["42", "42", None]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")
def test_gold_answers_of_real_sets_score_one_and_the_next_rows_zero():
    import pandas as pd

    frame = pd.read_parquet(SHARED / "gsm8k_test.parquet").head(200)
    gold = [row["ground_truth"] for row in frame["reward_model"]]
    shifted = gold[1:] + gold[:1]
    own = math_answer(gold, [rf"The answer is \boxed{{{g}}}." for g in gold], answer=gold)
    other = math_answer(gold, [rf"The answer is \boxed{{{g}}}." for g in shifted], answer=gold)
    assert own == [1.0] * 200
    assert other == [float(a.replace(",", "") == b.replace(",", "")) for a, b in zip(gold, shifted, strict=True)]
