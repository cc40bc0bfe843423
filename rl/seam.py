"""The start-up check of the seam between entrl and TRL: one clear sentence instead of a silent change of the loss."""

from __future__ import annotations

import inspect

import transformers
import trl
from packaging.version import Version
from trl import GRPOTrainer
from trl.trainer import utils

from rl.errors import SeamError

TESTED = ("1.15", "1.17")  # from, below

# The methods EntropyTrainer overrides or calls, and the leading parameters it relies on.
_METHODS = {
    "_prepare_inputs": ("self", "generation_batch"),
    "_tokenize_prompts": ("self", "prompts"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "log": ("self", "logs", "start_time"),
    # rl/resume.py; most are transformers'
    "_get_train_sampler": ("self", "dataset"),
    "_init_training_state": ("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
    "_get_output_dir": ("self", "trial"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_rng_state": ("self", "checkpoint"),
    "_maybe_log_save_evaluate": ("self",),
}


def check_seam() -> None:
    """Raise SeamError when the installed TRL is outside the tested range or its methods have another shape."""
    version = Version(trl.__version__)
    if not Version(TESTED[0]) <= version < Version(TESTED[1]):
        raise SeamError(
            f"TRL {version} is installed; entrl was tested with {TESTED[0]} <= trl < {TESTED[1]}. "
            f'Install one of those: pip install "trl>={TESTED[0]},<{TESTED[1]}".'
        )
    for name, expected in _METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        found = tuple(inspect.signature(method).parameters)[: len(expected)] if method else None
        if found != expected:
            raise SeamError(
                f"TRL {version} on transformers {transformers.__version__}: GRPOTrainer.{name} takes {found}; entrl was tested with {expected}. "
                f'Install a tested version: pip install "trl>={TESTED[0]},<{TESTED[1]}".'
            )
    if "outputs" not in inspect.signature(getattr(utils, "add_fused_lm_head", lambda: None)).parameters:
        raise SeamError(
            f"TRL {version} has no fused LM head with entropies, whose place entrl's own head takes. "
            f'Install a tested version: pip install "trl>={TESTED[0]},<{TESTED[1]}".'
        )
