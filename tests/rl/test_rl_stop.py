"""Signals: what one process makes of them, and that all ranks do the same of one rank's."""

import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerControl

from data import countdown
from ranks import two_ranks
from rl.callbacks.stop import StopAtBoundary
from rl.draw import Decoding, draw
from rl.errors import LEFT, Stopped
from rl.stop import SIGNALS, StopSignal
from tiny import save_model

WAITS = """
import time
from rl.stop import StopSignal
with StopSignal() as stop:
    print("listens", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_the_second_interrupt_leaves_and_nothing_else_does():
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "listens\n"
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == LEFT
    finally:
        process.kill()
    assert process.stderr.read() == "\nSIGTERM: stopping at the end of this step, with a checkpoint.\n"


def test_the_first_signal_is_named_and_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop and str(stop) == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def stopped(rank, folder):
    """What a rank does of a signal that the second one got: at a step's end, and while completions are drawn."""
    stop, control = StopSignal(), TrainerControl()
    callback = StopAtBoundary(stop, torch.device("cpu"))
    callback.on_step_end(None, None, control)
    early = control.should_training_stop
    stop.received = signal.SIGTERM if rank == 1 else None
    callback.on_step_end(None, None, control)
    flags = [control.should_log, control.should_save, control.should_training_stop, stop.agreed, not early]
    asked, model = [], AutoModelForCausalLM.from_pretrained(folder)

    def tell():
        asked.append(1)
        return rank == 1

    try:
        draw(model, countdown.tokenizer(), [[5, 6]] * 6, Decoding(2, batch_size=1), 1, seed=0, stop=tell)
    except Stopped:
        flags.append(True)
    return {"flags": flags, "asked": len(asked)}


def test_all_ranks_stop_for_the_signal_of_one(tmp_path):
    first, second = two_ranks(stopped, save_model(tmp_path))
    assert first["flags"] == second["flags"] == [True] * 6
    assert first["asked"] == 4 and second["asked"] == 2  # the first one has drawn its three batches, the second none
