"""What is printed of an evaluation."""

from functools import partial

from rl.draw import Drawn
from rl.eval_view import Drawing, show_problems, show_sets


class Terminal:
    """A standard output that is or is not a terminal."""

    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def drawn_by(monkeypatch, terminal, seconds, of=10, found=0):
    """What ``of`` batches of 4 samples and 40 tokens print, one every ``seconds``; the first ``found`` were on disk."""
    now, out = [0.0], Terminal(terminal)
    monkeypatch.setattr("rl.eval_view.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("sys.stdout", out)
    drawing = Drawing("eval it")
    for batch in range(1, of + 1):
        fresh = max(0, batch - found)
        now[0] += seconds if fresh else 0
        drawing(Drawn(batch, of, 4 * fresh, 40 * fresh, batch == 1))
    monkeypatch.undo()
    return drawing, out.text


def test_a_terminal_sees_one_line_that_goes_away(monkeypatch):
    _, text = drawn_by(monkeypatch, True, 2.0)
    assert "\n" not in text and text.endswith("\x1b[K")
    assert "eval it  batch 4/10  20 tok/s  ETA 0:12" in text


def test_a_file_gets_a_line_each_half_minute_and_none_of_a_short_drawing(monkeypatch):
    assert drawn_by(monkeypatch, False, 2.0)[1] == ""
    lines = drawn_by(monkeypatch, False, 20.0)[1].splitlines()
    assert [line.split()[3] for line in lines] == ["2/10", "4/10", "6/10", "8/10", "10/10"]


def test_what_was_found_on_disk_does_not_count_as_speed(monkeypatch):
    drawing, text = drawn_by(monkeypatch, True, 3.0, of=10, found=6)
    assert "batch 7/10  13 tok/s  ETA 0:09" in text
    assert drawing.summary(12.0) == "16 samples, 13 tokens/s, in 0:12"
    assert Drawing("x").summary(1.0) == "nothing new"


def test_the_greedy_samples_that_follow_are_counted_too(monkeypatch):
    drawing = Drawing("it")
    for drawn in (Drawn(1, 2, 4, 40, True), Drawn(2, 2, 8, 80), Drawn(1, 1, 2, 20, True)):
        drawing(drawn)
    assert (drawing.samples, drawing.tokens) == (10, 100)


def answers(texts, strict=False):
    return texts


def test_the_prompt_and_the_extractor_are_shown(capsys):
    show_problems("math", 1500, "<bos>What\nis\x1b[31m 1+1?", answers, partial(answers, strict=True))
    said = capsys.readouterr().out
    assert "math, 1,500 problems" in said and "<bos>What\\nis?[31m 1+1?" in said
    assert f"{answers.__module__}.answers; strict: {answers.__module__}.answers(strict=True)" in said
    show_problems("math", 1, "a" * 1000 + "END", answers, None)
    prompt = capsys.readouterr().out.splitlines()[1]
    assert prompt.endswith("END") and len(prompt) < 200 and " ... " in prompt


def test_one_row_a_set_and_no_number_cut_off(capsys):
    values = {f"{m}@{k}": 0.5 for k in (1, 2, 4, 8, 16, 32) for m in ("pass", "maj")}
    one = {**values, "pass@1/low": 0.4, "pass@1/high": 0.6, "greedy": 0.123, "extracted": 0.9, "len": 123.4}
    two = {**one, "strict/pass@1": 0.333}
    show_sets({"first": one, "second": two}, {"first": 5, "second": 1319}, "a title")
    said = capsys.readouterr().out
    assert "a title" in said and "…" not in said
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert "0.500 (0.400 to 0.600)" in rows["first"] and "0.123" in rows["first"] and "0.333" not in rows["first"]
    assert "1,319" in rows["second"] and "0.333" in rows["second"]
