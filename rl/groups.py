"""What concerns a prompt's completions together: who of them is trained on, how likely each was, and the run's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from rl.contract import Rollout, RunFacts
from rl.errors import ConfigError

# Losses that divide by trained tokens; the others divide by all completions, votes included.
_BY_TOKENS = ("dapo", "bnpo", "cispo", "vespo")


def trained_of_group(share: float, args: GRPOConfig) -> int:
    """How many completions of a group are trained on while all of them vote.

    Raises:
        ConfigError: a share that is none, that leaves no whole number from 2 on, or a loss that would count the votes.
    """
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ConfigError(
            f"rollout.train_share={share} is no share. Expected 0 < train_share <= 1; 0.5 is TTRL's 32 of 64."
        )
    count = share * args.num_generations
    if abs(count - round(count)) > 1e-6 or count < 2:
        raise ConfigError(
            f"rollout.train_share={share} of trainer.num_generations={args.num_generations} is {count:g} completions. "
            "Expected a whole number of at least 2."
        )
    if share == 1:
        return args.num_generations
    if args.loss_type not in _BY_TOKENS:
        raise ConfigError(
            f"rollout.train_share={share} needs a loss that divides by trained tokens, not trainer.loss_type={args.loss_type}. "
            f"Expected one of: {', '.join(_BY_TOKENS)}."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError("rollout.train_share works with trainer.multi_objective_aggregation=sum_then_normalize only.")
    return round(count)


def only_votes(rows: int, group: int, trained: int, device: torch.device) -> Tensor:
    """(rows,) bool: completions behind the first ``trained`` of their group (TTRL, arXiv 2504.16084: 32 of 64)."""
    return torch.arange(rows, device=device) % group >= trained


def leave_out(output: dict, votes: Tensor, accelerator) -> None:
    """Take completions out of every loss and statistic of a rollout; they have no tokens to train on any more."""
    output["completion_mask"] = output["completion_mask"].masked_fill(votes.unsqueeze(1), 0)
    tokens = output["completion_mask"] * output.get("tool_mask", 1)
    output["num_items_in_batch"] = accelerator.gather(tokens.sum()).sum()


def group_of(trainer: GRPOTrainer, rows: int) -> Tensor:
    """(rows,) the number of each completion's group in this rollout; a group may begin on one rank and end on the next."""
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    first = trainer.accelerator.process_index * rows
    return (torch.arange(rows, device=trainer.accelerator.device) + first) // size


def new_rollout(output: Mapping[str, Any], mask: Tensor, size: int, trained: int) -> Rollout:
    """What plug-ins see of TRL's ``output``, ``trained`` of every ``size`` completions being more than votes."""
    return Rollout(
        mask=mask,
        ids=output["completion_ids"],
        reward=output["reward"],
        old_entropy=output.get("old_entropy"),
        group_size=size,
        trained=trained,
    )


def mean_logps(trainer: GRPOTrainer, prompts: list, completions: list[list[int]], known: Tensor | None) -> list[float]:
    """Mean logp of each completion's tokens under the policy, in nats.

    Args:
        completions: token ids. known: (B, T) logp of these tokens where something computed them already; otherwise this costs
            a forward.
    """
    lengths = torch.tensor([len(ids) for ids in completions])
    if known is None:
        device = trainer.accelerator.device
        asked = [torch.tensor(ids, device=device) for ids in trainer._tokenize_prompts(prompts)[0]]
        told = [torch.tensor(ids, device=device) for ids in completions]
        ids = [
            pad(asked, trainer.processing_class.pad_token_id, "left"),
            pad(told, trainer.processing_class.pad_token_id, "right"),
        ]
        mask = [pad([torch.ones_like(x) for x in side], 0, where) for side, where in ((asked, "left"), (told, "right"))]
        with torch.no_grad():
            known, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat(ids, 1),
                torch.cat(mask, 1),
                ids[1].shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
            )
    logp = known.detach().double().cpu()
    inside = torch.arange(logp.shape[1]) < lengths.unsqueeze(1)
    return (logp.where(inside, 0).sum(1) / lengths.clamp(min=1)).tolist()


def on_policy(args: GRPOConfig) -> bool:
    """Whether no update lies between a rollout and its use."""
    return args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0


def run_facts(args: GRPOConfig, world_size: int) -> RunFacts:
    """What plug-ins may know of a run."""
    return RunFacts(
        on_policy=on_policy(args),
        loss_type=args.loss_type,
        beta=args.beta,
        micro_batch=args.per_device_train_batch_size,
        world_size=world_size,
        group_size=args.num_generations,
    )
