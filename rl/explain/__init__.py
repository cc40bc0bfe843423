"""``entrl explain``: the exact objective that a configuration trains, with its numbers filled in."""

from __future__ import annotations

from omegaconf import DictConfig

from rl.config import reward_gates
from rl.errors import ConfigError
from rl.explain.methods import plugins
from rl.explain.objective import advantage, objective
from rl.explain.run import batch, evaluation, left_out, policies
from rl.explain.text import Row, page
from rl.options import batch_algebra
from rl.preflight.report import Section
from rl.preflight.settings import check_settings, world


def explain(cfg: DictConfig) -> str:
    """What ``cfg`` trains, as text of at most 100 columns. No data and no weights are read, nothing is downloaded.

    Raises:
        ConfigError: all that is wrong with the settings, a line each.
    """
    section = Section("explain")
    pipeline, args = check_settings(cfg, section, new=False, here=False)
    if section.errors:
        raise ConfigError("\n".join(section.errors))
    algebra = batch_algebra(cfg.trainer, world(cfg, here=False))
    gates = reward_gates(cfg.reward)
    rewards = {name: (float(node.weight), *gates[name]) for name, node in cfg.reward.items()}
    sections: dict[str, list[Row]] = {
        f"The loss  (trainer.loss_type={args.loss_type})": objective(
            args, algebra, bool(cfg.peft), cfg.rollout.train_share
        ),
        "The advantage": advantage(args, algebra, rewards, cfg.rollout.train_share),
        "Batches": batch(args, algebra),
        "Whose probabilities": policies(args, algebra, cfg.model.path),
        **plugins(pipeline, args, algebra),
        "Left out, exactly": left_out(args, algebra, pipeline, cfg.rollout.backend),
        "Evaluation": evaluation(cfg.eval, args),
    }
    return page(sections)


__all__ = ["explain"]
