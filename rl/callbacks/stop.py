"""Ends a training where all ranks agree to."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from rl.reduce import any_rank
from rl.stop import StopSignal


class StopAtBoundary(TrainerCallback):
    """Ends the training after the step in which any rank got a signal, with a log line and a checkpoint."""

    def __init__(self, stop: StopSignal, device: torch.device):
        self.stop, self.device = stop, device

    def on_step_end(self, args, state, control, **kwargs):
        if any_rank(bool(self.stop), self.device):
            self.stop.agreed = True
            control.should_log = control.should_save = control.should_training_stop = True
