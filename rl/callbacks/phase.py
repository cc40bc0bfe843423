"""What happens at the bounds of steps: the trainer's clock starts, what was recorded is written, a checkpoint asked for."""

from __future__ import annotations

from transformers import TrainerCallback
from trl import GRPOTrainer


class StepPhase(TrainerCallback):
    """Starts the clock of ``trainer``, ends its recordings and asks for its checkpoints."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.recording is not None:
            self.trainer.recording.after_step()
        control.should_save |= self.trainer.checkpoints.due(state.global_step)
