"""The launcher by itself, with ranks that are small scripts; and what one start of a rank leaves in its folder."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rl import launch, rundir
from rl.errors import CRASHED, DONE, LEFT, MISTAKE, REQUEUE, CheckpointError, ConfigError, Stopped, guarded
from rl.rank import attempt
from rl.rundir import state
from rl.stop import SIGNALS

RANK = """
import os, signal, sys, time
from pathlib import Path
rank, folder, told = int(os.environ["RANK"]), Path(sys.argv[1]), []
def listen():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: told.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
def until(what):
    end = time.monotonic() + 60
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
def fails(text):
    (folder / "logs" / "attempt_2").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / "attempt_2" / f"rank_{rank}.error").write_text(text)
"""


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rundir.describe(run, "engine: {processes: 2, nodes: 1, threads: null}\nrollout: {}\n", [], ["train"], 1)
    return run


def start(folder, script):
    """The exit code of a run of two ranks that do this."""
    (folder / "rank.py").write_text(RANK + script)
    return launch.Launcher(folder, 2, None, command=[sys.executable, "-S", str(folder / "rank.py")]).run()


def after(ready, *numbers):
    """Send this process signals, a moment apart, once ``ready`` exists."""

    def send():
        end = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


def test_the_exit_code_is_that_of_all_ranks(folder):
    assert start(folder, "sys.exit(0)") == DONE
    assert start(folder, "sys.exit(85)") == REQUEUE
    assert state(folder) == "open"  # the ranks say how it ended


def test_ranks_know_their_place(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "PYTHONSAFEPATH", "OMP_NUM_THREADS"]
    names.append("ENTRL_LAUNCHER")
    start(folder, f"(folder / f'place_{{rank}}').write_text(' '.join(os.environ[n] for n in {names}))")
    for rank in (0, 1):
        assert (folder / f"place_{rank}").read_text() == f"{rank} {rank} 2 2 127.0.0.1 1 3 {os.getpid()}"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_comes_before_the_ranks_listen_waits_for_them(folder, number):
    before = signal.getsignal(number)
    after(folder / "up_1", number)
    listens = "(folder / f'up_{rank}').touch(); time.sleep(1); listen(); until(lambda: told)"
    assert start(folder, f"{listens}; sys.exit(85 if told == [{int(number)}] else 1)") == REQUEUE
    assert signal.getsignal(number) == before and not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_signal_while_ranks_are_started_reaches_all_of_them(folder, monkeypatch):
    first = launch.Launcher._start

    def interrupted(self, rank, port):
        os.kill(os.getpid(), signal.SIGUSR1)
        return first(self, rank, port)

    monkeypatch.setattr(launch.Launcher, "_start", interrupted)
    assert start(folder, "listen(); until(lambda: told); sys.exit(85 if told else 1)") == REQUEUE


def test_ranks_that_were_started_do_not_outlive_a_start_that_fails(folder, monkeypatch):
    first = launch.Launcher._start

    def fails(self, rank, port):
        if rank == 1:
            raise OSError("no more processes")
        return first(self, rank, port)

    monkeypatch.setattr(launch.Launcher, "_start", fails)
    launcher = launch.Launcher(folder, 2, None, command=[sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(OSError, match="no more processes"):
        launcher.run()
    assert [process.wait(30) for process in launcher.ranks] == [-signal.SIGKILL]


def test_a_second_interrupt_kills_the_ranks_and_what_they_have_started(folder, monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    after(folder / "up_1", signal.SIGINT, signal.SIGINT)
    works = "listen(); os.fork(); (folder / f'of_{rank}_{os.getpid()}').touch(); (folder / f'up_{rank}').touch(); time.sleep(100)"
    with pytest.raises(Left, match=str(LEFT)):
        start(folder, works)
    end = time.monotonic() + 30
    started = [int(path.name.rpartition("_")[2]) for path in folder.glob("of_*")]
    while any(map(alive, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(started) == 4 and not any(map(alive, started))


def alive(pid):
    """Not so of one that is only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("code", "expected"), [(1, CRASHED), (2, MISTAKE)])
def test_the_rank_that_failed_first_is_printed_and_the_others_are_ended(folder, monkeypatch, capfd, code, expected):
    monkeypatch.setattr(launch, "_GRACE", 0.5)
    (folder / "logs" / "attempt_1").mkdir(parents=True)
    (folder / "logs" / "attempt_1" / "rank_0.error").write_text("an old one")
    script = f"""
if rank == 1:
    fails("the first one")
    sys.exit({code})
until((folder / "logs/attempt_2/rank_1.error").exists)
fails("it mourns")
time.sleep(100)
"""
    assert start(folder, script) == expected
    said = capfd.readouterr().err
    assert "rank 1 of 2 failed first" in said and said.rstrip().endswith("the first one")
    assert state(folder) == "open"  # the rank has said so, or it did not touch the run


def test_a_killed_rank_is_named_and_not_the_one_that_mourns(folder, monkeypatch, capfd):
    monkeypatch.setattr(launch, "_GRACE", 0.5)
    script = "if rank == 0: fails('it mourns'); sys.exit(1)\ntime.sleep(0.2); os.kill(os.getpid(), 9)"
    assert start(folder, script) == CRASHED
    assert "rank 1 of 2 was killed by SIGKILL and left no traceback. That is often" in capfd.readouterr().err
    assert (folder / "FAILED").read_text() == "rank 1 was killed by SIGKILL\n"


ORPHAN = """
import os, sys, time
from pathlib import Path
from rl.rank import _end_with_the_launcher
from rl.stop import StopSignal
with StopSignal() as stop:
    os.environ["ENTRL_LAUNCHER"] = sys.argv[2]
    _end_with_the_launcher()
    Path(sys.argv[1], "ready").touch()
    end = time.monotonic() + 60
    while not stop and time.monotonic() < end:
        time.sleep(0.01)
    Path(sys.argv[1], "told.new").write_text(str(stop))
    Path(sys.argv[1], "told.new").rename(Path(sys.argv[1], "told"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize("launcher", ["$$", "1"])
def test_a_rank_whose_launcher_was_killed_stops_well(folder, launcher):
    """The second is too late to be told: its parent is already another process than the one that started it."""
    (folder / "orphan.py").write_text(ORPHAN)
    wait = "while [ ! -e ready ]; do sleep 0.05; done; kill -9 $$"
    command = f"cd {folder}; {sys.executable} orphan.py . {launcher} 2>/dev/null & {wait}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(["bash", "-c", command], env=env, timeout=60).returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while not (folder / "told").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (folder / "told").read_text() == "SIGTERM"


def test_what_is_no_run_folder_is_not_started(folder, tmp_path):
    for argv, says in (
        ([], "Expected one run folder"),
        ([str(folder), "seed=1"], "Expected one run folder"),
        ([str(tmp_path / "nothing")], "has no config.yaml"),
    ):
        with pytest.raises(CheckpointError, match=says):
            launch.main(argv)
    (folder / "config.yaml").write_text("engine: {processes: two, nodes: 1, threads: null}\n")
    with pytest.raises(CheckpointError, match=r"config.yaml cannot be used: .* Was it edited\?"):
        launch.main([str(folder)])
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="was not written to its end"):
        launch.main([str(folder)])
    (tmp_path / "sweep.json").touch()
    with pytest.raises(CheckpointError, match="entrl sweep retry"):
        launch.main([str(tmp_path)])
    assert not (tmp_path / "nothing").exists()


def texts(folder, pattern):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.glob(pattern)}


def test_an_attempt_says_how_it_ended(folder):
    with attempt(folder, 0, redirect=False):
        assert state(folder) == "open"
    assert state(folder) == "done"
    with pytest.raises(Stopped), attempt(folder, 0, redirect=False):
        assert state(folder) == "open"
        raise Stopped("SIGTERM at step 3 of 9")
    assert (folder / "STOPPED").read_text() == f"SIGTERM at step 3 of 9; go on: entrl resume {folder}\n"
    with pytest.raises(ConfigError), attempt(folder, 0, redirect=False):
        raise ConfigError("so it is")
    assert (folder / "FAILED").read_text() == "ConfigError: so it is\n" and not (folder / "STOPPED").exists()
    assert texts(folder, "logs/*/*.error") == {"logs/attempt_3/rank_0.error": "entrl: so it is"}


def test_of_two_ranks_that_fail_the_first_one_says_why(folder):
    with pytest.raises(OSError, match="it mourns"), attempt(folder, 0, redirect=False):
        with pytest.raises(ValueError, match="the first"), attempt(folder, 1, redirect=False):
            raise ValueError("the first")
        raise OSError("it mourns")
    assert (folder / "FAILED").read_text() == "ValueError: the first\n"
    assert {name for name in texts(folder, "logs/*/*") if name.endswith(".error")} == {
        "logs/attempt_1/rank_0.error",
        "logs/attempt_1/rank_1.error",
    }


def test_what_a_later_rank_prints_goes_to_its_log(folder):
    code = "import os, sys; from pathlib import Path; from rl.rank import attempt\nwith attempt(Path(sys.argv[1]), int(sys.argv[2]), True):"
    code += "\n    print('a word', flush=True); os.write(2, b'of a library')"
    for rank, words in ((0, 2), (1, 0)):
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(rank)], capture_output=True, text=True)
        assert ("a word" in done.stdout) + ("of a library" in done.stderr) == words
        log = (folder / "logs" / "attempt_1" / f"rank_{rank}.log").read_text()
        assert ("a word" in log) + ("of a library" in log) == 2 - words and f"rank {rank}, process" in log


def test_a_later_rank_that_is_done_or_stopped_marks_nothing(folder):
    with attempt(folder, 1, redirect=False):
        pass
    with pytest.raises(Stopped), attempt(folder, 1, redirect=False):
        raise Stopped("SIGTERM at step 3 of 9")
    assert state(folder) == "open"


def test_a_start_in_a_folder_that_is_being_trained_in_leaves_it_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(rundir, "hold", lambda folder: None)
    rundir.finish(folder, "STOPPED", "before")
    with pytest.raises(ConfigError, match="is being trained by another process"), attempt(folder, 0, redirect=False):
        raise AssertionError("it was let in")
    assert (folder / "STOPPED").read_text() == "before\n"
    assert "is being trained" in (folder / "logs" / "attempt_1" / "rank_0.error").read_text()
    with pytest.raises(ConfigError, match="is being trained by another process"):
        launch.main([str(folder)])


def test_a_folder_that_cannot_be_written_is_one_sentence(folder):
    (folder / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"), attempt(folder, 0, redirect=False):
        pass
    (folder / ".lock").mkdir()
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        launch.main([str(folder)])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("so it is"), MISTAKE, "entrl: so it is\n"),
        (ValueError("a bug"), None, ""),
        (KeyboardInterrupt(), LEFT, "\nentrl: interrupted.\n"),
        (
            Stopped("SIGTERM at step 3 of 9"),
            REQUEUE,
            "\nentrl: SIGTERM at step 3 of 9. Exit code 85: start it again to go on.\n",
        ),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, error, code, says):
    def work(argv):
        raise error

    for name in ("RANK", "ENTRL_LAUNCHER", "ENTRL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    if code is None:
        with pytest.raises(ValueError, match="a bug"):
            guarded(work, [])
    else:
        assert guarded(work, []) == code
    assert capsys.readouterr().err == says
    monkeypatch.setenv("ENTRL_LAUNCHER", "1")  # which prints the error of the rank that failed first
    monkeypatch.setenv("RANK", "1")
    assert guarded(work, []) == (code or CRASHED)
    assert capsys.readouterr().err == (says if code == LEFT else "")
