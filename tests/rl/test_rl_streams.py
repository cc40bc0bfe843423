"""Output after its reader has left."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
from rl.errors import REQUEUE, Stopped, guarded
from rl.stop import StopSignal

def work(argv):
    with StopSignal() as stop:
        sys.stdin.readline()  # until the reader has left
        os.kill(os.getpid(), signal.SIGINT)
        print("a line of the log" * 1000, flush="flush" in argv)
        assert stop
    raise Stopped("SIGINT at step 3 of 9")

sys.exit(guarded(work, sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [[], ["flush"]])
def test_a_run_stops_well_when_the_tee_behind_it_got_the_interrupt_first(words):
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run.stdout.close()
    run.stdin.write(b"\n")
    run.stdin.close()
    assert run.wait(60) == 85


def test_other_errors_of_a_stream_are_errors():
    code = "from rl.errors import guarded; guarded(lambda argv: print('x' * 9999, flush=True), [])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left" in done.stderr
