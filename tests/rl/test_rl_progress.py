import sys

from rl.callbacks import progress
from rl.callbacks.progress import Progress, clock, show_sample, show_table

METRICS = {"reward/mean": 0.25, "entropy/mean": 0.5, "rollout/len": 12.0, "time/tokens_per_second": 12345.0}


def test_into_a_file_every_nth_line_the_first_and_the_last(capsys):
    show = Progress(25, every=10)
    for step in range(1, 26):
        show(step, METRICS, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert (
        "reward 0.250" in lines[0] and "H 0.500" in lines[0] and "len 12.0" in lines[0] and "12,345 tok/s" in lines[0]
    )


def test_on_a_terminal_one_line_is_rewritten(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show = Progress(3)
    for step in range(1, 4):
        show(step, METRICS, {})
    out = capsys.readouterr().out
    assert out.count("\r") == 3 and out.count("\n") == 1 and out.endswith("\n")


def test_the_estimate_leaves_the_slow_first_step_out(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    show = Progress(100, every=1)
    for step, seconds in ((1, 50.0), (2, 51.0), (3, 52.0)):
        now[0] = seconds
        show(step, METRICS, {})
    etas = [line.split("ETA ")[1] for line in capsys.readouterr().out.splitlines()]
    assert etas == ["--", "1:38", "1:37"]


def test_a_step_without_a_trainable_token_shows_no_number_instead_of_zero(capsys):
    Progress(1)(1, {"reward/mean": 0.0}, {})
    assert "H nan" in capsys.readouterr().out


def test_clock():
    assert [clock(s) for s in (None, 0, 65, 7384)] == ["--", "0:00", "1:05", "2:03:04"]


def test_a_completion_is_shown_as_it_is_and_cannot_drive_the_terminal(capsys):
    row = {"reward": 1.0, "entropy": [0.1, 0.3], "prompt": "[red]a[/red]", "completion": "b :x: [/bold]\x1b[31m\ac"}
    show_sample(7, [row])
    out = capsys.readouterr().out
    assert "step 7" in out and "1.00" in out and "0.20" in out
    assert "[red]a[/red]" in out and "b :x: [/bold]" in out and "\x1b" not in out and "\a" not in out


def test_no_sample_prints_nothing(capsys):
    show_sample(1, [])
    assert capsys.readouterr().out == ""


def test_the_table_has_the_rows_of_a_run_before_and_after(capsys):
    names = ["pass@1", "pass@8", "maj@8", "greedy", "entropy/mean", "entropy/top20_mean", "len"]
    before = {name: 0.1 + i / 100 for i, name in enumerate(names)} | {"pass@1/low": 0.05, "pass@1/high": 0.15}
    after = {name: 0.5 + i / 100 for i, name in enumerate(names)}
    show_table(before, after, "8 problems")
    out = capsys.readouterr().out
    for label in (
        "pass@1",
        "pass@8",
        "maj@8",
        "greedy",
        "mean token entropy",
        "top 20 % token entropy",
        "completion length",
    ):
        assert label in out
    line = next(line for line in out.splitlines() if "pass@1" in line)
    assert "0.100  (0.05 to 0.15)" in line and "0.500" in line and line.index("0.100") < line.index("0.500")


def test_a_title_with_brackets_is_no_markup(capsys):
    show_table(None, {"pass@1": 0.5}, "runs/[/b] :x:")
    assert "runs/[/b] :x:" in capsys.readouterr().out
