"""``entrl``: pure Hydra overrides after a verb. Heavy imports happen only once a verb needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import rl
from rl.errors import ConfigError, user_errors

HELP = """entrl {version}: GRPO for language models, looking at and acting on the entropy of every token

usage: entrl VERB [key=value ...] [--config-dir DIR]

  train   fine-tune a model with RL
            entrl train
            entrl train plugin=[fork_mask,steer] model=qwen2.5_0.5b data=gsm8k plugin.steer.w_min=0.8
  eval    sample a run folder, a saved model or a hub model on held-out problems
            entrl eval runs/NAME eval.samples=32 'eval.ks=[1,8,32]'
            entrl eval Qwen/Qwen2.5-0.5B 'eval.sets=[gsm8k,math500]'
  sweep   run every combination of choices: here, some at a time, or as one Slurm job array
            entrl sweep plugin=[],[fork_mask],[steer] seed=1,2,3 launcher.at_once=2
            entrl sweep sweep=rho seed=1,2 launcher=slurm           a named sweep; what is on the line replaces its keys
            entrl sweep status|retry|cancel runs/NAME
  doctor  say everything that is going to go wrong before a night is lost; needs no GPU, key or network
            entrl doctor model=qwen2.5_0.5b data=gsm8k
            entrl doctor --rollouts 32                       also sample, and suggest rho and entropy targets
  rewards check whether rewards tell right from wrong on the data
            entrl rewards check data=math500 data.path=math500.parquet
  show    print what an experiment or override changes against the default (--full: everything)
            entrl show experiment=paper/steer
            entrl show --full plugin=[steer]

  --cfg job         print the resolved configuration and stop      --config-dir DIR  add your own groups, as DIR/plugin/my_idea.yaml
  dry_run=true      do everything but the training                 --version

plug-ins, run in the order given, plugin=[a,b]; plugin=[] is plain GRPO:
{plugins}

sweeps, sweep=NAME:
{sweeps}

experiments, experiment=NAME (add scale=tiny for the embedded model and task):
{experiments}

Files of a run: runs/NAME/. ENTRL_DEBUG=1 shows tracebacks. Documentation: README.md and docs/."""

VERBS = ("train", "eval", "sweep", "doctor", "rewards", "show")
SWEEP_ACTIONS = ("status", "retry", "cancel")


_VALUES = {"--cfg": "job", "--config-dir": "FOLDER", "--out": "FOLDER", "--rollouts": "32"}


class Arguments(NamedTuple):
    """The command line, taken apart."""

    verb: str
    action: str | None
    target: str | None
    overrides: list[str]
    cfg: bool
    full: bool
    config_dir: str | None
    out: str | None
    rollouts: int


def parse(argv: Sequence[str]) -> Arguments:
    """Flags may stand anywhere; everything with a ``=`` or a leading ``~`` is an override; ``eval`` may have a target.

    Raises:
        ConfigError: an unknown verb or flag, or a word that is no override.
    """
    words = list(argv)
    verb = words.pop(0)
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no verb. Expected one of {', '.join(VERBS)}; entrl --help shows examples.")
    flags: dict[str, str | bool] = {}
    overrides: list[str] = []
    action = target = None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in _VALUES:
            if not equals and not words:
                raise ConfigError(f"{name} needs a value: {name} {_VALUES[name]}.")
            flags[name] = value if equals else words.pop(0)
        elif word == "--full":
            flags[word] = True
        elif word.startswith("--"):
            raise ConfigError(f"{word} is no option of entrl {verb}. See entrl --help.")
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        elif verb == "sweep" and action is None and word in SWEEP_ACTIONS:
            action = word
        elif (verb in ("eval", "rewards") or action is not None) and target is None:
            target = word
        else:
            raise ConfigError(f"{word!r} is no override. Expected key=value, as trainer.max_steps=100.")
    if flags.get("--cfg", "job") != "job":
        raise ConfigError(f"--cfg {flags['--cfg']} is not known. Expected --cfg job.")
    if verb == "rewards" and target != "check":
        raise ConfigError(f"entrl rewards {target or ''}".rstrip() + " is not known. Expected entrl rewards check.")
    if action is not None and target is None:
        raise ConfigError(f"entrl sweep {action} needs the folder of a sweep: entrl sweep {action} runs/NAME.")
    rollouts = flags.get("--rollouts", "0")
    if not rollouts.isdigit():
        raise ConfigError(
            f"--rollouts {rollouts} is no number of problems. Expected one of at least 1, as --rollouts 32."
        )
    config_dir, out = flags.get("--config-dir"), flags.get("--out")
    return Arguments(
        verb, action, target, overrides, "--cfg" in flags, "--full" in flags, config_dir, out, int(rollouts)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0, 2 for an error of the user's, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(f"entrl {rl.__version__}")
        return 0
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("\nentrl: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("ENTRL_DEBUG") or not isinstance(error, user_errors()):
            raise
        print(f"entrl: {error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    _environment()
    from omegaconf import OmegaConf

    from rl.config import compose, differences

    if arguments.verb == "doctor":
        return _doctor(arguments)
    if arguments.verb == "sweep":
        return _sweep(arguments, argv)
    cfg = compose(arguments.overrides, arguments.config_dir)
    if arguments.cfg or (arguments.verb == "show" and arguments.full):
        print(OmegaConf.to_yaml(cfg), end="")
    elif arguments.verb == "show":
        for key, (default, value) in differences(cfg, compose()).items():
            print(f"{key}: {default} -> {value}")
    elif arguments.verb == "train":
        from rl.train import run

        run(cfg, arguments.overrides, argv)
    elif arguments.verb == "rewards":
        from rl.preflight.doctor import check_rewards

        return check_rewards(cfg)
    else:
        from rl.eval_run import eval_config, run_eval

        evaluated = eval_config(arguments.target, cfg, arguments.overrides)
        run_eval(arguments.target, evaluated, arguments.out, arguments.overrides)
    return 0


def _sweep(arguments: Arguments, argv: Sequence[str]) -> int:
    if arguments.action in ("status", "cancel"):
        if arguments.overrides:
            raise ConfigError(f"entrl sweep {arguments.action} takes no overrides, and got {arguments.overrides[0]}.")
        from rl.sweep.status import cancel, show_status

        return show_status(arguments.target) if arguments.action == "status" else cancel(arguments.target)
    from rl.quiet import quiet
    from rl.sweep.verb import retry, sweep

    quiet()
    if arguments.action == "retry":
        return retry(arguments.target, arguments.overrides)
    return sweep(arguments.overrides, arguments.config_dir, argv)


def _doctor(arguments: Arguments) -> int:
    """Print the report; 2 when there is something to mend."""
    from rl.preflight.doctor import examine
    from rl.quiet import quiet

    quiet()
    report = examine(arguments.overrides, arguments.config_dir, arguments.rollouts)
    for line in report.lines():
        print(line)
    return 2 if report.errors else 0


def _environment() -> None:
    """Before torch and transformers are imported: what they read from the environment once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def help_text() -> str:
    """The help page; plug-ins and experiments are listed from the first comment of their yaml files."""
    from rl.paths import configs_dir

    def listing(folder: str, width: int) -> str:
        root = configs_dir() / folder
        names = {str(p.relative_to(root).with_suffix("")): _first_comment(p) for p in sorted(root.rglob("*.yaml"))}
        return "\n".join(f"  {name:<{width}} {comment}" for name, comment in names.items())

    return HELP.format(
        version=rl.__version__,
        plugins=listing("plugin", 14),
        sweeps=listing("sweep", 24),
        experiments=listing("experiment", 24),
    )


def _first_comment(path) -> str:
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in lines if not line.startswith("@package")), "")


if __name__ == "__main__":
    sys.exit(main())
