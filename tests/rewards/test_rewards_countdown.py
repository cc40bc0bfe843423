import pytest

from rewards.countdown import final_answers, solved, verdict


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3 * 7 = 21 ; 21 + 2 = 23", "ok"),
        ("2 + 21 = 23", "pool"),
        ("3 * 7 = 21 ; 2 + 21 = 23", "ok"),
        ("3 * 7 = 22 ; 22 + 2 = 24", "arithmetic"),
        ("3 * 7 = 21", "unused"),
        ("3 + 7 = 10 ; 10 + 2 = 12", "target"),
        ("3 * 7 = 21 ; 21 + 2 = 23 ; 23 + 0 = 23", "pool"),
        ("3 - 7 = -4 ; 2 + 1 = 3", "parse"),
        ("", "parse"),
        ("3 * 7 = 21 ; 21 + 2 =", "parse"),
        ("the answer is 23", "parse"),
    ],
)
def test_verdicts(text, expected):
    assert verdict("3 7 2", 23, text) == expected


def test_a_number_is_used_once_and_results_stay_in_range():
    assert verdict("5 5", 10, "5 + 5 = 10") == "ok"
    assert verdict("5 4", 10, "5 + 5 = 10") == "pool"
    assert verdict("9 9", 81, "9 * 9 = 81") == "arithmetic"  # above 31
    assert verdict("2 3", -1, "2 - 3 = -1") == "parse"


def test_solved_reads_text_and_chat():
    completions = ["3 * 7 = 21 ; 21 + 2 = 23", [{"role": "assistant", "content": "3 + 7 = 10 ; 10 + 2 = 12"}]]
    assert solved(["p", "p"], completions, numbers=["3 7 2"] * 2, target=[23, 23], level=[3, 3]) == [1.0, 0.0]


def test_final_answers_are_one_spelling_or_none():
    assert final_answers([" 3 *  7 = 21 ;21 + 2 = 23"]) == ["7 * 3 = 21 ; 21 + 2 = 23"]
    assert final_answers(["2 + 3 = 5 ; 4 * 5 = 20 ; 9 - 2 = 7"]) == ["3 + 2 = 5 ; 5 * 4 = 20 ; 9 - 2 = 7"]
    assert final_answers(["2 - 3 = 1"]) == ["2 - 3 = 1"] and final_answers(["nonsense"]) == [None]
