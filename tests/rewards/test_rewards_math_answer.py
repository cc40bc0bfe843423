"""Maths answers: spellings, extraction, and expressions that would stall or kill a run."""

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from rewards import pool
from rewards.errors import RewardError
from rewards.math_answer import final_answers, math_answer
from rewards.math_grading import extract, grade, spelling
from rewards.pool import Failed, run

RIGHT = [
    ("18", r"so the answer is \boxed{18}."),
    ("1/2", r"we get $\frac{1}{2}$"),
    (r"\frac{14}{3}", r"\boxed{14/3}"),
    ("1000", r"\boxed{1,000}"),
    ("43,500", r"\boxed{43500}"),
    ("0.5", r"\boxed{\frac{1}{2}}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"Thus $\boxed{(3, \frac{\pi}{2})}$"),
    ("10\\%", r"\boxed{10}"),
    ("90^\\circ", r"\boxed{90}"),
    ("27", "Working: 3 x 9.\nAnswer: 27"),
    ("27", "**Final Answer:** $27$."),
    ("27", "<think>maybe 3</think><answer>27</answer>"),
    ("27", r"<think>maybe 3</think><answer>\boxed{27}</answer>"),
    ("Navin", r"\boxed{\text{Navin}}"),
    ("1.6e-19", r"\boxed{1.6 \times 10^{-19}}"),
    ("2$, $3", r"\boxed{2, 3}"),
    ("f(n)=n$, $g(n)=1", r"\boxed{f(n)=n, g(n)=1}"),
    ("5", r"\boxed{5 \text{ cm}}"),
    ("5", "Answer: 5 dollars"),
    ("7", "Answer: 5\nWait. Answer: 7"),
    ("7", "Final answer: 5. No, the answer: 7."),
    ("1000", r"\boxed{1e3}"),
    ("3e6", r"\boxed{3,000,000}"),
    ("1000", r"\boxed{1,000 apples}"),
    ("5", r"so $x = 5$"),
    ("4", r"first \boxed{3}, no: \boxed{4}"),
]
WRONG = [
    ("18", r"\boxed{19}"),
    ("18", ""),
    ("18", "no number here"),
    ("1/2", r"\boxed{2}"),
    ("12", r"\boxed{1,2}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("x+1", r"\boxed{x-1}"),
    ("3", r"first \boxed{3}, no: \boxed{4}"),
    ("Navin", r"\boxed{\text{Evelyn}}"),
    ("18", r"\boxed{18 \text{ thousand}}"),
    ("3", r"\boxed{3 or 4}"),
    ("3", "Answer: 3 squared"),
    ("5", r"\boxed{5!}"),
    ("1e-12", r"\boxed{2e-12}"),
    ("0.0000001", r"\boxed{0.0000002}"),
    ("12", r"\boxed{1 2}"),
    ("9007199254740993", r"\boxed{9007199254740992}"),
    ("7", "Answer: 7\nWait. Answer: 5"),
    ("27", "Answer: 28, as 27 is too small"),
]


@pytest.mark.parametrize("gold, text", RIGHT)
def test_equal_in_other_spellings(gold, text):
    assert grade(gold, text) == (1.0, True)


@pytest.mark.parametrize("gold, text", WRONG)
def test_not_equal(gold, text):
    assert grade(gold, text).score == 0.0


def test_strict_reads_the_box_only():
    assert extract(r"Answer: 3, in \boxed{\frac{1}{2}} and \boxed{4", strict=True) is None
    assert grade("3", "Answer: 3").score == 1.0 and grade("3", "Answer: 3", strict=True) == (0.0, False)
    assert grade("3", r"\boxed{3}", strict=True).score == 1.0 and grade("3", r"\fbox 3", strict=True).score == 1.0
    assert math_answer(["p"] * 2, ["it is 3", r"\boxed{3}"], ["3", "3"], strict=True) == [0.0, 1.0]
    assert final_answers(["it is 3", r"\boxed{3}"], strict=True) == [None, "3"]


def test_a_spelling_never_makes_two_answers_one():
    answers = [
        "1,2",
        "12",
        "1",
        "x+1",
        "x-1",
        "a",
        "A",
        "(1,2)",
        "[1,2]",
        "0.5",
        "5",
        "-5",
        r"\frac{1}{2}",
        r"\frac{2}{1}",
        r"\sqrt2",
    ]
    assert len({spelling(a) for a in answers}) == len(answers)


def test_the_answer_of_each_text_in_one_spelling():
    texts = [r"first 3, then \boxed{42}", "it is 42", "no answer", r"\boxed{\text{Blue}}", ""]
    assert final_answers(texts) == ["42", "42", None, "blue", None]
    assert final_answers([r"\boxed{east}", r"\boxed{East}", r"\boxed{\text{east}}"]) == ["east"] * 3


def test_chats_numbers_as_golds_and_threads():
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(math_answer(["p", "p"], [r"\boxed{4}", [{"content": "5"}]], answer=[4, "4"]))
    )
    thread.start()
    thread.join(60)
    assert got == [1.0, 0.0]


# each would hang or exhaust a process that evaluates it
EVIL = ["9^{9^{9^{9^{9}}}}", "100000000!", r"\binom{10^9}{5\cdot 10^8}", "10^{10^{10}}"]
BIG = [r"\frac{1}{" * 300 + "x" + "}" * 300, "9" * 1_000_000, "(" * 50_000, r"\sqrt{" * 500, "1+" * 100_000 + "1"]


def test_pathological_expressions_cost_their_own_score_only(caplog):
    count, series = 120, {}
    golds = [str(i) for i in range(count)]
    texts = [rf"we get $\frac{{x}}{{2}}$, so \boxed{{{i + (i % 3 == 0)}}}" for i in range(count)]
    planted = {10 * i + 5: rf"\boxed{{{evil}}}" for i, evil in enumerate([*EVIL, *BIG])}
    for i, text in planted.items():
        texts[i] = text
    with caplog.at_level(logging.WARNING, "entrl.rewards"):
        scores = math_answer(["p"] * count, texts, golds, timeout=1.0, log_metric=series.__setitem__)
    assert scores == [float(i % 3 != 0 and i not in planted) for i in range(count)]
    assert len(EVIL) / count <= series["reward/timeouts"] <= series["reward/unparsed"] <= len(planted) / count
    assert "took more than 1 s and scores 0" in caplog.text and "more samples were given up" in caplog.text
    assert max(map(len, caplog.messages)) < 300
    assert math_answer(["p"], [r"\boxed{4}"], ["4"]) == [1.0]


def work(samples):
    """A worker's job with accidents: it dies, hangs, takes all memory or raises where a sample says so."""
    results = []
    for sample in samples:
        if sample == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif sample == "hang":
            9**9**9
        elif sample == "memory":
            bytearray(64 << 30)
        elif sample == "raise":
            raise ValueError("no")
        results.append(sample)
    return results


@pytest.mark.parametrize(
    "fault, why", [("die", "died"), ("hang", "timeout"), ("memory", "raised"), ("raise", "raised")]
)
def test_order_is_kept_and_nothing_lost_whatever_happens_to_a_worker(fault, why, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    samples = [*range(40), fault, *range(40, 70), fault, 70]
    found = run(work, samples, timeout=1.0)
    assert [r.why if isinstance(r, Failed) else r for r in found] == [why if s == fault else s for s in samples]


def leave():
    os._exit(1)


@pytest.fixture
def fresh_pool(monkeypatch):
    """Workers that see this file."""
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    pool.stop()
    yield
    pool.stop()


def test_a_pool_that_breaks_while_samples_wait_for_room_is_remade(fresh_pool):
    assert run(work, [0], timeout=5.0, workers=1) == [0]
    (worker,) = pool._pools[1]._pool_manager.worker_manager.workers
    os.kill(worker, signal.SIGSTOP)  # takes nothing, so the pipe of 64 KiB fills
    threading.Timer(1.0, os.kill, (worker, signal.SIGKILL)).start()
    samples = [str(i).rjust(2_000) for i in range(500)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(run(work, samples, timeout=5.0, workers=1)), daemon=True)
    thread.start()
    thread.join(60)  # a hang guard
    assert found == samples


def test_idle_workers_that_were_killed_cost_no_sample(fresh_pool):
    assert run(work, [0], timeout=5.0, workers=2) == [0]
    for worker in list(pool._pools[2]._pool_manager.worker_manager.workers):
        os.kill(worker, signal.SIGKILL)
    assert run(work, list(range(50)), timeout=5.0, workers=2) == list(range(50))


def test_a_sample_that_breaks_every_pool_costs_itself_only(fresh_pool, monkeypatch):
    def breaks_at_poison(work, chunks, timeout, workers):
        good = next((i for i, chunk in enumerate(chunks) if "poison" in chunk), len(chunks))
        return [work(chunk) for chunk in chunks[:good]] + [None] * (len(chunks) - good)

    monkeypatch.setattr(pool, "_round", breaks_at_poison)
    samples = [*range(20), "poison", *range(20, 50)]
    found = run(work, samples, timeout=5.0, workers=1)
    assert [r.why if isinstance(r, Failed) else r for r in found] == ["died" if s == "poison" else s for s in samples]


def test_workers_that_cannot_start_are_an_error_and_not_a_zero(fresh_pool, monkeypatch):
    monkeypatch.setattr(pool, "_prepare", leave)
    with pytest.raises(RewardError, match="could not be started"):
        math_answer(["p"], [r"\boxed{4}"], ["4"], workers=1)


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"workers": 0}, {"workers": -1}])
def test_settings_that_do_not_work_are_refused(wrong):
    with pytest.raises(RewardError, match=f"{next(iter(wrong))}=.* does not work"):
        math_answer(["p"], ["4"], ["4"], **wrong)


def test_a_limit_on_memory_that_is_already_there_stays():
    limited = "import resource as r; r.setrlimit(r.RLIMIT_AS, (3 << 30, 3 << 30)); from rewards import pool; pool._prepare(); "
    done = subprocess.run(
        [sys.executable, "-c", limited + "print(r.getrlimit(r.RLIMIT_AS))"], capture_output=True, text=True
    )
    assert done.stdout == f"({3 << 30}, {3 << 30})\n", done.stderr


SCRIPT = """
import os, sys
from rewards.math_answer import math_answer
if __name__ == "__main__":
    math_answer(["p"], ["4"], ["4"])
    print("ready", flush=True)
    {rest}
"""


def test_a_script_without_a_guard_is_not_run_again_by_the_workers(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from rewards.math_answer import math_answer\n"
        "print(math_answer(['p'] * 3, ['4', '9^{9^{9^{9}}}', '5'], ['4', '4', '4'], timeout=1.0), flush=True)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1.0, 0.0, 0.0]\n", done.stderr


@pytest.mark.parametrize(
    "rest", ["", "os.kill(os.getpid(), 9)", 'math_answer(["p"], ["9^{9^{9^{9}}}"], ["4"], timeout=600)']
)
def test_no_worker_outlives_its_run(tmp_path, rest):
    script = tmp_path / "grade_once.py"
    script.write_text(SCRIPT.format(rest=rest))
    group = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert group.stdout.readline() == "ready\n"
    if "600" in rest:
        os.kill(group.pid, signal.SIGINT)  # Ctrl-C in the middle
    group.wait(timeout=120)
    for _ in range(600):  # a hang guard
        alive = subprocess.run(["pgrep", "-s", str(group.pid)], capture_output=True, text=True).stdout.split()
        if not alive:
            return
        threading.Event().wait(0.1)
    raise AssertionError(f"still there: {alive}")
