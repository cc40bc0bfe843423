"""Does the program in a completion pass its tests? Runs code that a model wrote."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from rewards.errors import RewardError
from rewards.sandbox import Sandbox
from rewards.text import Completion, text_of
from rewards.values import choice, number, truth, whole

_HARNESS = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
_LANGUAGES = {"", "py", "python", "python3"}


class Verdict(NamedTuple):
    """What one program came to: the share of its tests that pass, and whether it ran out of time."""

    share: float
    timeout: bool = False


class CodeExec:
    """1.0 where the Python program in the completion passes all tests of its row, else 0.0; with ``partial`` the share passed.

    Every program runs in a new process with its own limits, an empty environment, an empty folder that is deleted, without
    network, and without any file of this machine but Python and the system's libraries, read-only (``rewards.sandbox``).

    Tests come in one of two forms, as columns of the data:
    ``tests``: a list of pieces of Python such as assert lines, or one text with all of them, which then is one test. They run
    after the program, in its name space, in order. A test passes when it runs to its end; nothing passes when the program itself
    does not run to its end, so that ``sys.exit(0)`` before the tests helps nobody.
    ``inputs`` and ``outputs``: texts for standard input and what standard output must be, line by line without white space at
    line ends and empty lines at the end; the program must end with status 0. One process each.
    A row without any test scores 0.

    Not prevented: with ``tests`` the program shares its process with them. It may give its objects an ``__eq__`` that is always
    true, or search the interpreter's frames for what the tests are; with ``inputs`` and ``outputs`` the answers never enter the
    process. Memory is limited for each process, not for all ``processes`` of a program together. There is no filter of system
    calls: the kernel's own defects are not defended against.

    Series: ``reward/code_exec/no_code``, ``timeout``, ``no_tests``, shares of completions.

    Args:
        enabled: must be true, on purpose. timeout: seconds a process. memory_mb, output_kb, processes: limits of ``Sandbox``.
            workers: programs at once, None is one a core. network: "deny" or "allow". sandbox: "namespaces" or "none", which
            lets programs do what you may do. fenced: the program is the last block between ``` lines that is marked python or
            not at all; false takes the whole text. partial: the share of the tests instead of all or nothing.

    Raises:
        RewardError: not enabled, a value that does not work, a machine that cannot confine programs, tests of another form.
    """

    __name__ = "code_exec"

    def __init__(
        self,
        enabled: bool = False,
        timeout: float = 10.0,
        memory_mb: int = 1024,
        output_kb: int = 1024,
        processes: int = 16,
        workers: int | None = None,
        network: Literal["deny", "allow"] = "deny",
        sandbox: Literal["namespaces", "none"] = "namespaces",
        fenced: bool = True,
        partial: bool = False,
    ):
        key = "reward.code_exec.fn"
        for name, value in (("enabled", enabled), ("fenced", fenced), ("partial", partial)):
            truth(f"{key}.{name}", value)
        if not enabled:
            raise RewardError(
                "reward.code_exec runs programs that the model wrote on this machine, so it is off. "
                "Turn it on with reward.code_exec.fn.enabled=true."
            )
        number(f"{key}.timeout", timeout, 0, above=True)
        for name, value, least in (
            ("memory_mb", memory_mb, 64),
            ("output_kb", output_kb, 1),
            ("processes", processes, 1),
        ):
            whole(f"{key}.{name}", value, least)
        whole(f"{key}.workers", workers, 1, none=True)
        choice(f"{key}.network", network, ("deny", "allow"))
        choice(f"{key}.sandbox", sandbox, ("namespaces", "none"))
        self.fenced, self.partial = fenced, partial
        self.workers = workers or len(os.sched_getaffinity(0))
        self.sandbox = Sandbox(sandbox == "namespaces", network == "allow", timeout, memory_mb, output_kb, processes)
        self.sandbox.check()

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        tests: Sequence | None = None,
        inputs: Sequence | None = None,
        outputs: Sequence | None = None,
        log_metric=None,
        **columns,
    ) -> list[float]:
        rows = _rows(len(completions), tests, inputs, outputs)
        codes = [last_block(text_of(c)) if self.fenced else text_of(c) for c in completions]
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = list(pool.map(self._verdict, codes, rows))
        if log_metric is not None:
            count = len(completions)
            log_metric("reward/code_exec/no_code", sum(code is None for code in codes) / count)
            log_metric("reward/code_exec/timeout", sum(v.timeout for v in verdicts) / count)
            log_metric("reward/code_exec/no_tests", sum(not row for row in rows) / count)
        return [v.share if self.partial else float(v.share == 1.0) for v in verdicts]

    def _verdict(self, code: str | None, row: list[str] | list[tuple[str, str]]) -> Verdict:
        if code is None or not row:
            return Verdict(0.0)
        return self._by_tests(code, row) if isinstance(row[0], str) else self._by_output(code, row)

    def _by_tests(self, code: str, tests: list[str]) -> Verdict:
        token = secrets.token_hex(16)
        task = json.dumps({"code": code, "tests": tests, "token": token})
        ended, output = self.sandbox.run(["-c", _HARNESS], stdin=task)
        marks = output.removeprefix(token)
        if marks == output or len(marks) != len(tests) or set(marks) - {"0", "1"}:
            return Verdict(0.0, ended == "timeout")
        return Verdict(marks.count("1") / len(tests))

    def _by_output(self, code: str, pairs: list[tuple[str, str]]) -> Verdict:
        passed, timeout = 0, False
        for text, expected in pairs:
            ended, output = self.sandbox.run(["solution.py"], stdin=text, files={"solution.py": code})
            good = ended == "exit" and _lines(output) == _lines(expected)
            passed, timeout = passed + good, timeout or ended == "timeout"
            if not good and not self.partial:
                break
        return Verdict(passed / len(pairs), timeout)


def last_block(text: str) -> str | None:
    """The last complete block between lines of ``` that is marked python or not at all; None without one."""
    found, block, language = None, None, ""
    for line in text.split("\n"):
        mark = line.strip()
        if block is None:
            if mark.startswith("```"):
                block, language = [], mark[3:].strip().lower()
        elif mark == "```":
            found, block = "\n".join(block) if language in _LANGUAGES else found, None
        else:
            block.append(line)
    return found


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _rows(count: int, tests, inputs, outputs) -> list[list[str] | list[tuple[str, str]]]:
    """The tests of each completion: pieces of Python, or pairs of input and output."""
    if tests is not None:
        return [_texts("tests", i, [t] if isinstance(t, str) and t.strip() else t or []) for i, t in enumerate(tests)]
    if inputs is None or outputs is None:
        raise RewardError(
            "reward.code_exec found no tests in the data. Expected the column tests, or both inputs and outputs; "
            "data.columns gives columns these names."
        )
    rows = []
    for i in range(count):
        given, wanted = _texts("inputs", i, inputs[i] or []), _texts("outputs", i, outputs[i] or [])
        if len(given) != len(wanted):
            raise RewardError(
                f"reward.code_exec: row {i} has {len(given)} inputs and {len(wanted)} outputs. Expected pairs."
            )
        rows.append(list(zip(given, wanted, strict=True)))
    return rows


def _texts(column: str, row: int, value) -> list[str]:
    bad = next((v for v in value if not isinstance(v, str)), None) if isinstance(value, list | tuple) else value
    if bad is not None or not isinstance(value, list | tuple):
        text = " or one text" if column == "tests" else ""
        raise RewardError(f"reward.code_exec: {column} of row {row} holds {bad!r}. Expected a list of texts{text}.")
    return list(value)
