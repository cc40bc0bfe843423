"""Silence what libraries say to developers of libraries, so that what a run says to a person can be read."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def settle_environment() -> None:
    """Before torch and transformers are imported: what they read from the environment once, and where a person's own code is.

    That is the current folder, for rewards and methods by import path, behind everything else: a ``data`` in it must not hide ours.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # it speaks as it is imported, which peft does wherever it is installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet() -> None:
    """Turn off progress bars, advisory warnings and info logs of the libraries underneath; errors still show."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for message in (
        ".*is_gradient_checkpointing.*",  # transformers 5.23, called by trl 1.16
        ".*gradient_checkpointing.*deprecated.*",
        ".*torch.*pin_memory.*",
        ".*'rollout_func'.*experimental.*",  # trl 1.16
        ".*(all_gather_into|reduce_scatter)_tensor.*deprecated.*",  # torch 2.13, called by deepspeed 0.19
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("trl", "accelerate", "math_verify"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_says_more_than_that_there_is_no_gpu)


def _says_more_than_that_there_is_no_gpu(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in str(record.msg)
