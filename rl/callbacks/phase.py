"""On resume TRL restarts its micro-step counter at 0 (trl 1.16), which shifts when it generates."""

from __future__ import annotations

from transformers import TrainerCallback
from trl import GRPOTrainer


class StepPhase(TrainerCallback):
    """Restores the counter, and starts the trainer's clock."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        self.trainer.meter.start()
