"""The token lens of runs, from what they recorded, and of models, from what they draw now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rl.errors import ConfigError
from rl.paths import plain_name
from rl.report.lens import MAX_SIDES, lens_of_run, write_lens
from rl.report.page import check_place
from rl.study.place import name_of


def show_lens(
    targets: Sequence[str], prompts: Sequence[str], overrides: Sequence[str], config_dir: str | None, out: Path | None
) -> Path:
    """Write the page of one or two targets, say what was left out of it, and return where it is.

    Run folders without prompts show what they recorded, which needs no torch. Everything else draws completions: of the prompts,
    or of the first held-out problems of the configuration.

    Args:
        targets: run folders, saved models or hub ids. out: default ``RUN/lens.html``, else ``./lens_<names>.html``.

    Raises:
        ConfigError: more than two targets, an empty prompt, or overrides where nothing is drawn. ReportError: nothing recorded, or
        the file cannot be written. CheckpointError: no model, or one without a tokenizer.
    """
    if len(targets) > MAX_SIDES:
        raise ConfigError(f"entrl lens shows one or two beside each other, and got {len(targets)}. Leave some out.")
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError('--prompt is empty. Give the text, as --prompt "What is 17 * 23?".')
    runs = [(Path(target) / "config.yaml").is_file() or (Path(target) / "sweep.json").is_file() for target in targets]
    recorded = all(runs) and not prompts
    names = "_vs_".join(plain_name(name_of(target)) for target in targets)
    single = recorded and len(targets) == 1
    place = out or (Path(targets[0]) / "lens.html" if single else Path(f"lens_{names}.html"))
    check_place(place)
    if recorded and overrides:
        raise ConfigError(
            f"{overrides[0]} changes nothing in what a run recorded. Leave it out, or let its model draw anew: "
            f"entrl lens {targets[0]}/checkpoints/final {overrides[0]}, or --prompt TEXT."
        )
    if recorded:
        sides = [lens_of_run(target) for target in targets]
    else:
        from rl.study.draw_lens import lens_of_model  # torch

        sides = []
        for target in targets:
            sides.append(lens_of_model(target, prompts, overrides, config_dir, alike=sides[0] if sides else None))
    for line in write_lens(sides, place):
        print(line)
    return place
