"""A GRPO trainer that stops at any step and goes on exactly: what TRL and transformers leave out of a checkpoint, or restore wrongly.

Theirs are the weights, optimizer, schedule and random states. Left out (trl 1.16): the micro-step that decides when to generate, and
rollouts that are not used up. Restored wrongly (transformers 5.23): the order of the problems after the first epoch, the place in a
stream, and a run that was already at its end, which trains one step more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOTrainer

from rl.checkpoint import Checkpoints, check_processes, manifest_of
from rl.errors import CheckpointError, ConfigError, SaveError
from rl.reduce import barrier, from_first, gather, rank, world_size

_SHARED = "Put run.dir on a file system that all nodes share."


class ResumableTrainer(GRPOTrainer):
    """What :class:`rl.trainer.EntropyTrainer` has for checkpoints; it also has the ``pipeline`` and the ``dynamics``."""

    def use_checkpoints(self, checkpoints: Checkpoints | None) -> None:
        """Write checkpoints there; None: into the trainer's output folder, where one is asked for.

        Raises:
            ConfigError: checkpoints that could not be gone on from, or be loaded as a model.
        """
        args, zero = self.args, self.accelerator.state.deepspeed_plugin
        if checkpoints is None:
            checkpoints = Checkpoints(Path(args.output_dir), every=None, keep_last=args.save_total_limit)
        if checkpoints.every and args.sync_ref_model:
            raise ConfigError(
                f"trainer.sync_ref_model=true moves a reference model that checkpoints do not hold, and checkpoint.every="
                f"{checkpoints.every} asks for them. Set checkpoint.every=null or trainer.sync_ref_model=false."
            )
        if zero is not None and zero.zero_stage == 3 and not zero.zero3_save_16bit_model:
            raise ConfigError(
                "DeepSpeed's zero_optimization.stage3_gather_16bit_weights_on_model_save is false, so checkpoints and the "
                "final model would hold no weights that from_pretrained can load. Set it to true."
            )
        self.checkpoints = checkpoints
        self._partial: Path | None = None  # while a checkpoint is written
        self._began = 0  # the step that this start goes on from
        self._train_sampler = None

    def train(self, resume_from_checkpoint: str | None = None):
        """Train to the end, from the beginning or from a checkpoint folder.

        Raises:
            ConfigError: the checkpoint is of other processes, another engine, other batches or data.
            CheckpointError: it is none of entrl's, or the ranks have different ones. SaveError: a checkpoint could not be written.
        """
        step = 0
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint)
            step = manifest_of(path)["step"]
            check_processes(path, world_size())
            check_facts(path, self._facts())
        steps = gather(torch.tensor([step], device=self.accelerator.device))[0].tolist()
        if len(set(steps)) > 1:
            raise CheckpointError(f"the processes would go on from different steps ({steps}). {_SHARED}")
        self._began = step
        if rank() == 0:
            self.checkpoints.start(step)
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # what the log averages must not cross a checkpoint; args, kwargs: transformers' own, handed on
        self.control.should_log |= self.control.should_save
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def save_final(self) -> Path:
        """Write the model as it is now to ``final``, whole or not at all; where nothing was trained it stays as it is.

        Raises:
            SaveError: it could not be written.
        """
        checkpoints, step = self.checkpoints, self.state.global_step
        there = from_first(checkpoints.final_step() if rank() == 0 else None)
        if there != step or self._began != step:
            with self._complete(checkpoints.folder / "final"):
                partial = checkpoints.folder / ".partial-final"
                self.save_model(str(partial))
                barrier()
                if rank() == 0:
                    checkpoints.commit_final(partial, step)
            barrier()
        return checkpoints.folder / "final"

    def save_here(self) -> None:
        """A checkpoint of this step, where there is none."""
        there = (self.checkpoints.folder / f"checkpoint-{self.state.global_step}").is_dir()
        if not from_first(there if rank() == 0 else None):
            self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model, trial):
        """All ranks write into a partial folder, which becomes the checkpoint once it is whole."""
        step, checkpoints = self.state.global_step, self.checkpoints
        try:
            with self._complete(checkpoints.folder / f"checkpoint-{step}"):
                if rank() == 0:
                    checkpoints.open(step)
                barrier()
                self._partial = checkpoints.partial(step)
                super()._save_checkpoint(model, trial)
                write_state(self._partial / f"checkpoint-{step}", rank(), self._state())
                barrier()
                if rank() == 0:
                    check_complete(self._partial / f"checkpoint-{step}", world_size())
                    checkpoints.commit(step, world_size(), self._facts())
        except SaveError:
            checkpoints.discard(step)
            raise
        finally:
            self._partial = None
        barrier()

    @contextmanager
    def _complete(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SaveError(
                f"{path} could not be written: {reason}. Checkpoints before it are untouched. Where the disk is full make room "
                "(checkpoint.keep_last= keeps fewer), then resume."
            ) from error

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def create_model_card(self, *args, **kwargs) -> None:
        """None: TRL would write one beside the checkpoints at every save."""

    # ---- the state --------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        """What has to be the same for a checkpoint to fit."""
        args, zero = self.args, self.accelerator.state.deepspeed_plugin
        stream = isinstance(self.train_dataset, IterableDataset)
        return {
            "engine": f"zero{zero.zero_stage}" if zero is not None else "fsdp" if self.is_fsdp_enabled else "ddp",
            "trainer.per_device_train_batch_size": args.per_device_train_batch_size,
            "trainer.gradient_accumulation_steps": args.gradient_accumulation_steps,
            "trainer.steps_per_generation": args.steps_per_generation,
            "trainer.num_iterations": args.num_iterations,
            "trainer.num_generations": args.num_generations,
            "number of training problems": None if stream else len(self.train_dataset),
            "plugin": list(self.pipeline.plugins),
        }

    def _state(self) -> dict[str, Any]:
        """This rank's state beyond what transformers saves."""
        used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        epoch = math.ceil(self.state.epoch) - 1  # state.epoch is the share done of it, 1 at its end
        micro_steps = self.state.max_steps * self.args.gradient_accumulation_steps  # a stream's epoch, for transformers
        return {
            "micro_step": self._step,
            "stream": [epoch, round((self.state.epoch - epoch) * micro_steps)],
            "rollout": None if used_up else self._buffered_inputs,
            "rollout_entropy": None if used_up else self._rollout_entropy,
            "plugins": self.pipeline.state_dict(),
            "dynamics": self.dynamics.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._step, self._rollout_step = state["micro_step"], -1  # since every saved rollout there was an update
        self._buffered_inputs, self._rollout_entropy = state["rollout"], state["rollout_entropy"]
        self._window = (0, [])
        self.pipeline.load_state_dict(state["plugins"])
        self.dynamics.load_state_dict(state["dynamics"])
        if self.use_vllm:
            self._last_loaded_step = -1  # the engine has other weights, even if it has seen this step

    # ---- the place in the data --------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """Restore everything; returns the epoch to go on in, and the micro-batches of it that are done."""
        epoch, done = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return epoch, done
        state = read_state(Path(resume_from_checkpoint), rank(), self.accelerator.device)
        self._restore(state)
        if self.state.global_step >= max_steps:
            self._load_rng_state(resume_from_checkpoint)
            return num_train_epochs, 0
        sampler = self._train_sampler
        if sampler is None:
            return tuple(state["stream"])
        for _ in range(epoch if sampler.shuffle else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)  # the order of an epoch that is over
        return epoch, done


def check_complete(folder: Path, world: int) -> None:
    """Raise OSError where a rank has written elsewhere."""
    if missing := [r for r in range(world) if not _file(folder, r).is_file()]:
        raise OSError(f"the files of ranks {missing} did not arrive. {_SHARED}")


def check_facts(path: Path, now: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint was written under settings that it does not fit any more."""
    was = manifest_of(path)["facts"]
    if changed := [name for name in now if was.get(name) != now[name]]:
        name = changed[0]
        raise ConfigError(
            f"{path} was written with {name}={was.get(name)}, now it is {now[name]}. Going on exactly needs the same: set it "
            f"back, or start a new run from the weights with model.path={path}."
        )


def write_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write a rank's state: tensors as safetensors, all else as JSON in that file's metadata.

    Raises:
        ConfigError: a plug-in's state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_taken_apart(state, "state", tensors))
    save_file(tensors, _file(folder, rank), metadata={"state": text})


def read_state(folder: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """What :func:`write_state` wrote, tensors on ``device``; tuples come back as lists."""
    with safe_open(_file(folder, rank), framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (no dict)
        return _put_together(json.loads(file.metadata()["state"]), tensors)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"entrl_state_{rank}.safetensors"


_TENSOR = "tensor at"


def _taken_apart(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it, its tensors moved into ``tensors`` under their place in it."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # slices share memory
        return {_TENSOR: where}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _taken_apart(item, f"{where}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_taken_apart(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which a checkpoint does not hold. state_dict() may give tensors, numbers, texts, "
        "truth values, None, lists, and dictionaries with text keys."
    )


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_together(item, tensors) for key, item in value.items()}
    return [_put_together(item, tensors) for item in value] if isinstance(value, list) else value
