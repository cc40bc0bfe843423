"""Programs of a model: what passes, and what they must not be able to do."""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rewards.code_exec import CodeExec, last_block
from rewards.errors import RewardError
from rewards.sandbox import Sandbox


def problem():
    if sys.platform != "linux":
        return "programs run on Linux only"
    try:
        Sandbox().check()
    except RewardError as error:
        return str(error)


PROBLEM = problem()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
needs_namespaces = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
SANDBOX = "none" if PROBLEM else "namespaces"


def reward(**settings):
    return CodeExec(**{"enabled": True, "timeout": 20, "sandbox": SANDBOX, "fenced": False, **settings})


def score(code, *tests, **settings):
    """Of one program with assert lines."""
    return reward(**settings)(["p"], [code], tests=[list(tests)])[0]


def alive(word):
    """Processes with this word on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [path] if word.encode() in path.read_bytes() else []
    return found


SQUARE = "def f(x):\n    return x * x\n"

# ---- what passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, value",
    [
        (SQUARE, 1.0),
        ("def f(x): return x + x", 0.0),
        ("def f(x): return (", 0.0),
        ("", 0.0),
        ("f = \ud800", 0.0),
        ("f = '\0'", 0.0),
        (SQUARE + "raise ValueError", 0.0),
        (SQUARE + "import sys; sys.exit(0)", 0.0),
        (SQUARE + "import os; os._exit(0)", 0.0),
        ("import sys\ndef f(x): sys.exit(0)", 0.0),
        ("def f(x): raise KeyboardInterrupt", 0.0),
        (SQUARE + "if __name__ == '__main__': raise ValueError", 1.0),
        (SQUARE + "print('x' * 10)", 1.0),
        ("import numbers, dataclasses, asyncio\n" + SQUARE, 1.0),
    ],
)
def test_tests_pass_only_when_program_and_tests_run_to_their_end(code, value):
    assert score(code, "assert f(3) == 9", "assert f(0) == 0") == value


def test_share_or_all():
    tests = ["assert f(2) == 4", "assert f(3) == 9", "assert f(0) == 1", "raise SystemExit(0)"]
    assert score(SQUARE, *tests) == 0.0
    assert score(SQUARE, *tests, partial=True) == 0.5
    assert score(SQUARE + "raise ValueError", *tests, partial=True) == 0.0


def test_tests_as_one_text_are_one_test():
    text = "def check(g):\n    assert g(2) == 4\n    assert g(3) == 9\n\ncheck(f)\n"
    assert reward()(["p"] * 2, [SQUARE, "f = abs"], tests=[text, text]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "code, value",
    [
        ("print(int(input()) * 2)", 1.0),
        ("print(int(input()) * 2, end='  \\n\\n')", 1.0),
        ("if __name__ == '__main__':\n    print(int(input()) * 2)", 1.0),
        ("print(int(input()) * 2); raise ValueError", 0.0),
        ("print(int(input()) * 2); import sys; sys.exit(0)", 1.0),
        ("print(6)", 0.0),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\n')", 0.0),
        ("print(input(), input())", 0.0),
    ],
)
def test_input_and_output(code, value):
    assert reward()(["p"], [code], inputs=[["3\n", "5"]], outputs=[["6\n", "10\n"]]) == [value]


def test_share_of_input_and_output():
    columns = {"inputs": [["3", "5"]], "outputs": [["6", "x"]]}
    assert reward(partial=True)(["p"], ["print(int(input()) * 2)"], **columns) == [0.5]


def test_every_completion_has_its_own_tests_and_keeps_its_place():
    codes = [f"import time; time.sleep({0.2 * (i % 2 == 0)}); a = {i}" for i in range(6)]
    tests = [[f"assert a == {i if i != 3 else -1}"] for i in range(6)]
    assert reward(workers=3)(["p"] * 6, codes, tests=tests) == [1, 1, 1, 0, 1, 1]


def test_the_last_python_block_counts():
    assert last_block("x") is None
    assert last_block("```python\na = 1\n```") == "a = 1"
    assert last_block("```bash\nls\n```\ntext\n```py\na\nb\n```\n```sh\nrm\n```\n") == "a\nb"
    assert last_block("```\nfirst\n```\n```python\ncut off") == "first"
    assert last_block("```bash\nls\n```\nno program\n```text\nx\n```") is None


def test_a_completion_without_a_block_and_a_row_without_tests_score_zero_and_are_counted():
    series = {}
    texts = ["no block", f"so:\n```python\n{SQUARE}```", f"```\n{SQUARE}```", f"```\n{SQUARE}```"]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    tests = [["assert f(2) == 4"], ["assert f(2) == 4"], [], None]
    assert reward(fenced=True)(["p"] * 4, chat, tests=tests, log_metric=series.__setitem__) == [0, 1, 0, 0]
    assert series == {
        "reward/code_exec/no_code": 0.25,
        "reward/code_exec/timeout": 0.0,
        "reward/code_exec/no_tests": 0.5,
    }


# ---- what must not be possible --------------------------------------------------------------------------------------


def test_an_endless_loop_is_stopped_and_counted():
    series, start = {}, time.monotonic()
    codes = ["while True: pass", "import time; time.sleep(1000)", SQUARE]
    values = reward(timeout=1)(["p"] * 3, codes, tests=[["assert f(2) == 4"]] * 3, log_metric=series.__setitem__)
    assert values == [0, 0, 1] and series["reward/code_exec/timeout"] == pytest.approx(2 / 3)
    assert time.monotonic() - start < 60, "a hang"


def test_memory_is_limited():
    assert score("a = bytearray(1 << 30)", "assert True", memory_mb=256) == 0.0
    assert score("a = bytearray(1 << 30)", "assert True", memory_mb=2048) == 1.0


def test_output_is_limited():
    flood = "for _ in range(100):\n    print('x' * (1 << 20))\n"
    assert score(flood, "assert True") == 1.0, "with tests nobody reads it"
    columns = {"inputs": [[""]], "outputs": [["x" * (1 << 20)]]}
    assert reward()(["p"], [f"print('x' * {1 << 20})"], **columns) == [0.0], "one letter and the end of line too much"
    assert reward(output_kb=1025)(["p"], [f"print('x' * {1 << 20})"], **columns) == [1.0]
    assert reward()(["p"], [flood], **columns) == [0.0]


def test_a_program_cannot_say_that_it_passed():
    """It writes to every descriptor and replaces what the harness might use; then its tests fail as they must."""
    write = "import os\nfor fd in range(20):\n    try: os.write(fd, b'1')\n    except OSError: pass\n"
    replace = (
        "import builtins, os, json, sys\n"
        "builtins.exec = builtins.compile = os._exit = lambda *a, **k: None\n"
        "os.write = lambda fd, data: len(data)\n"
        "builtins.print = lambda *a: None\n"
    )
    assert score(write, "assert False") == 0.0
    assert score(write + "os._exit(0)", "assert False") == 0.0
    assert score(replace, "assert False") == 0.0
    assert score(SQUARE + replace, "assert f(2) == 4") == 1.0


def test_nothing_of_the_environment_is_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted")
    assert score("import os", "assert 'planted' not in str(os.environ)", "assert 'HF_TOKEN' not in os.environ") == 1.0


def test_children_do_not_outlive_the_program():
    word = f"1000.{os.getpid()}"
    start = f"import subprocess\nsubprocess.Popen(['sleep', '{word}']"
    assert score(f"{start})", "assert True") == 1.0
    assert (
        score(f"{start}, start_new_session={SANDBOX == 'namespaces'})\nwhile True: pass", "assert True", timeout=1) == 0
    )
    assert alive(word) == []


@needs_namespaces
def test_a_fork_bomb_stays_small_and_goes():
    word = f"2000.{os.getpid()}"
    bomb = f"""
import os
while True:
    try:
        if os.fork() == 0: os.execv('/usr/bin/sleep', ['sleep', '{word}'])
    except OSError: pass
"""
    assert score(bomb, "assert True", timeout=2) == 0.0
    assert alive(word) == []
    count = "import os, time\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: time.sleep(100)\n    n += 1\nexcept OSError: pass"
    assert score(count, "assert 1 <= n < 8", processes=8) == 1.0


@needs_namespaces
def test_files_outside_can_be_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("planted")
    code = f"""
import os
def outcome(action):
    try: action()
    except OSError as error: return type(error).__name__
    return "done"
read = outcome(lambda: open({str(secret)!r}).read())
home = outcome(lambda: os.listdir({str(Path.home() / ".ssh")!r}))
passwords = outcome(lambda: open("/etc/passwd").read())
processes = outcome(lambda: os.listdir("/proc/1"))
new = outcome(lambda: open({str(tmp_path / "new")!r}, "w"))
system = outcome(lambda: open("/usr/entrl_was_here", "w"))
python = outcome(lambda: open({str(Path(os.__file__).parent / "entrl_was_here")!r}, "w"))
own = outcome(lambda: open("here", "w").write("x"))
"""
    outside = "assert {read, home, passwords, processes, new} == {'FileNotFoundError'}, (read, home, passwords, processes, new)"
    assert (
        score(code, outside, "assert system == python == 'OSError'", "assert own == 'done'", "assert os.getuid()")
        == 1.0
    )
    assert list(tmp_path.iterdir()) == [secret]


@needs_namespaces
def test_mounts_cannot_be_made_writable_again():
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def remount(): return libc.mount(None, b"/usr", None, ctypes.c_ulong(32 | 4096), None)
as_is = remount()
libc.unshare(0x10000000 | 0x20000)
in_another_namespace = remount()
"""
    assert score(code, "assert as_is == in_another_namespace == -1") == 1.0


@needs_namespaces
@pytest.mark.parametrize("network, value", [("deny", 0.0), ("allow", 1.0)])
def test_the_network_is_not_there_unless_allowed(network, value):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        assert score(code, "assert True", network=network) == value


def test_without_confinement_the_limits_still_hold(tmp_path):
    settings = {"sandbox": "none", "timeout": 2, "memory_mb": 256}
    assert score(SQUARE, "assert f(2) == 4", **settings) == 1.0
    assert score("while True: pass", "assert True", **settings) == 0.0
    assert score("a = bytearray(1 << 30)", "assert True", **settings) == 0.0
    assert score("import os", "assert os.listdir() == []", "assert 'USER' not in os.environ", **settings) == 1.0
    (tmp_path / "open").write_text("x")
    assert score(f"a = open({str(tmp_path / 'open')!r}).read()", "assert a == 'x'", **settings) == 1.0


@needs_namespaces
def test_a_machine_that_cannot_confine_is_refused_and_told_the_way_out(monkeypatch):
    monkeypatch.setattr(Sandbox, "_visible", ["/usr", "/not/there"])
    with pytest.raises(RewardError, match="cannot keep .* on this machine: mount: bind of /not/there.*fn.sandbox=none"):
        reward()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_it_is_off_unless_asked_for():
    with pytest.raises(RewardError, match="so it is off. Turn it on with reward.code_exec.fn.enabled=true"):
        CodeExec()


@pytest.mark.parametrize(
    "setting",
    [
        {"enabled": "true"},
        {"timeout": 0},
        {"timeout": "x"},
        {"memory_mb": 1},
        {"output_kb": 0},
        {"processes": 0},
        {"workers": 0},
        {"network": "on"},
        {"sandbox": "docker"},
        {"partial": 1},
    ],
)
def test_settings_that_do_not_work(setting):
    key, value = next(iter(setting.items()))
    with pytest.raises(RewardError, match=f"reward.code_exec.fn.{key}={value!r}"):
        reward(**setting)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "found no tests in the data"),
        ({"inputs": [["1"]]}, "found no tests in the data"),
        ({"tests": [[1, 2]]}, "tests of row 0 holds 1. Expected a list of texts or one text"),
        ({"tests": [{"a": 1}]}, "tests of row 0 holds {'a': 1}"),
        ({"inputs": [["1", "2"]], "outputs": [["1"]]}, "row 0 has 2 inputs and 1 outputs"),
        ({"inputs": ["12"], "outputs": [["1", "2"]]}, "inputs of row 0 holds '12'. Expected a list of texts"),
    ],
)
def test_columns_that_do_not_work(columns, message):
    with pytest.raises(RewardError, match=message):
        reward()(["p"], ["a"], **columns)
