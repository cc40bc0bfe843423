"""A training leaves its report however it ends, and never fails for it."""

import pytest

from rl import rundir
from rl.errors import Stopped
from rl.rank import attempt
from rl.report import run_page
from synthetic_run import write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "a", marker=None, summary=False)


@pytest.mark.parametrize(
    "error, state", [(None, "done"), (Stopped("SIGTERM at step 3 of 9"), "stopped"), (ValueError("a bug"), "failed")]
)
def test_a_run_with_steps_has_its_report_and_the_report_knows_the_end(folder, error, state):
    try:
        with attempt(folder, 0, redirect=False):
            if error:
                raise error
    except type(error or ()) as raised:
        assert raised is error
    page = (folder / "report.html").read_text()
    assert rundir.state(folder) == state and f'class="state {state}"' in page
    assert error is None or str(error) in page


def test_only_the_first_rank_writes_it_and_only_of_a_run_with_steps(folder):
    with attempt(folder, 1, redirect=False):
        pass
    (folder / "metrics.jsonl").write_text("")
    with attempt(folder, 0, redirect=False):
        pass
    assert not (folder / "report.html").exists()


def test_somebody_who_leaves_at_once_does_not_wait_for_a_report(folder):
    with pytest.raises(KeyboardInterrupt), attempt(folder, 0, redirect=False):
        raise KeyboardInterrupt
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_made_is_one_line(folder, capsys, monkeypatch):
    def broken(folder):
        raise MemoryError("so little\nof it")

    monkeypatch.setattr(run_page, "write_report", broken)
    with attempt(folder, 0, redirect=False):
        pass
    said = capsys.readouterr().out
    assert said == f"report.html was not written (MemoryError: so little). Try entrl report {folder}\n"
    assert rundir.state(folder) == "done"
