"""What happens at the bounds of steps: the trainer's clock starts, and a checkpoint is asked for where one is due."""

from __future__ import annotations

from transformers import TrainerCallback
from trl import GRPOTrainer


class StepPhase(TrainerCallback):
    """Starts the clock of ``trainer`` and asks for its checkpoints."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.trainer.checkpoints.due(state.global_step)
