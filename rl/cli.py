"""``entrl``: pure Hydra overrides after a verb. Heavy imports happen only once a verb needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import rl
from rl.errors import ConfigError, guarded
from rl.quiet import settle_environment

HELP = """entrl {version}: GRPO for language models, looking at and acting on the entropy of every token

usage: entrl VERB [key=value ...] [--config-dir DIR]

  train   fine-tune a model with RL
            entrl train
            entrl train plugin=[fork_mask,steer] model=qwen2.5_0.5b data=gsm8k plugin.steer.w_min=0.8
  resume  go on with a run that was stopped or killed, exactly, from its newest good checkpoint
            entrl resume runs/NAME                           or entrl train resume=auto run.name=NAME ...
  prepare check, and write the run folder that torchrun -m rl.rank RUN starts on any number of nodes
            entrl prepare engine=zero3 engine.nodes=2 engine.processes=8 model=qwen3_8b_base data=math
  eval    sample a run folder, a saved model or a hub model on held-out problems
            entrl eval runs/NAME eval.samples=32 'eval.ks=[1,8,32]'
            entrl eval Qwen/Qwen2.5-0.5B 'eval.sets=[gsm8k,math500]'
  slurm   train on a cluster: write the run folder, submit its job (docs/slurm.md)
            entrl slurm submit engine=zero3 engine.nodes=2 model=qwen3_8b_base data=math slurm.gpus_per_node=8
            entrl slurm submit --dry-run                     only print the script
  doctor  say everything that is going to go wrong before a night is lost; needs no GPU, key or network
            entrl doctor model=qwen2.5_0.5b data=gsm8k
            entrl doctor --rollouts 32                       also sample, and suggest rho and entropy targets
  rewards check whether rewards tell right from wrong on the data
            entrl rewards check data=math500 data.path=math500.parquet
  sync    deliver to W&B what it lacks of runs that were offline, cut off or resumed; can be repeated
            entrl sync runs/NAME
            entrl sync runs
  show    print what an experiment or override changes against the default (--full: everything)
            entrl show experiment=paper/steer
            entrl show --full plugin=[steer]

  --cfg job         print the resolved configuration and stop      --config-dir DIR  add your own groups, as DIR/plugin/my_idea.yaml
  dry_run=true      do everything but the training                 --version

plug-ins, run in the order given, plugin=[a,b]; plugin=[] is plain GRPO:
{plugins}

experiments, experiment=NAME (add scale=tiny for the embedded model and task):
{experiments}

Files of a run: runs/NAME/. ENTRL_DEBUG=1 shows tracebacks. Documentation: README.md and docs/."""

VERBS = ("train", "resume", "prepare", "slurm", "sync", "eval", "doctor", "rewards", "show")


_VALUES = {"--cfg": "job", "--config-dir": "FOLDER", "--out": "FOLDER", "--rollouts": "32"}


class Arguments(NamedTuple):
    """The command line, taken apart."""

    verb: str
    target: str | None
    overrides: list[str]
    cfg: bool
    full: bool
    dry: bool
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
    target = None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in _VALUES:
            if not equals and not words:
                raise ConfigError(f"{name} needs a value: {name} {_VALUES[name]}.")
            flags[name] = value if equals else words.pop(0)
        elif word == "--full" or (word == "--dry-run" and verb == "slurm"):
            flags[word] = True
        elif word.startswith("--"):
            raise ConfigError(f"{word} is no option of entrl {verb}. See entrl --help.")
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        elif verb in ("eval", "resume", "rewards", "slurm") and target is None:
            target = word
        else:
            raise ConfigError(f"{word!r} is no override. Expected key=value, as trainer.max_steps=100.")
    if flags.get("--cfg", "job") != "job":
        raise ConfigError(f"--cfg {flags['--cfg']} is not known. Expected --cfg job.")
    for needs, only in (("rewards", "check"), ("slurm", "submit")):
        if verb == needs and target != only:
            raise ConfigError(f"entrl {verb} {target or ''}".rstrip() + f" is not known. Expected entrl {verb} {only}.")
    rollouts = flags.get("--rollouts", "0")
    if not rollouts.isdigit():
        raise ConfigError(
            f"--rollouts {rollouts} is no number of problems. Expected one of at least 1, as --rollouts 32."
        )
    config_dir, out = flags.get("--config-dir"), flags.get("--out")
    given = [name in flags for name in ("--cfg", "--full", "--dry-run")]
    return Arguments(verb, target, overrides, *given, config_dir, out, int(rollouts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; docs/resume.md lists the exit codes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(f"entrl {rl.__version__}")
        return 0
    return guarded(_run, argv)


def _run(argv: Sequence[str]) -> int:
    if argv[0] == "sync":
        from rl.sync import sync

        return sync(argv[1:])
    arguments = parse(argv)
    settle_environment()
    from omegaconf import OmegaConf

    from rl.config import compose, differences

    if arguments.verb == "doctor":
        return _doctor(arguments)
    if arguments.verb == "resume":
        return _resume(arguments)
    cfg = compose(arguments.overrides, arguments.config_dir)
    if arguments.cfg or (arguments.verb == "show" and arguments.full):
        print(OmegaConf.to_yaml(cfg), end="")
    elif arguments.verb == "show":
        for key, (default, value) in differences(cfg, compose()).items():
            print(f"{key}: {default} -> {value}")
    elif arguments.verb == "train":
        from rl.train import run

        run(cfg, arguments.overrides, argv)
    elif arguments.verb == "prepare":
        from rl.prepare import prepare

        print(prepare(cfg, arguments.overrides, argv, here=False))
    elif arguments.verb == "slurm":
        from rl.slurm import submit_run

        submit_run(cfg, arguments.overrides, argv, show=arguments.dry or cfg.dry_run)
    elif arguments.verb == "rewards":
        from rl.preflight.doctor import check_rewards

        return check_rewards(cfg)
    else:
        from rl.eval_run import eval_config, run_eval

        evaluated = eval_config(arguments.target, cfg, arguments.overrides)
        run_eval(arguments.target, evaluated, arguments.out, arguments.overrides)
    return 0


def _doctor(arguments: Arguments) -> int:
    """Print the report; 2 when there is something to mend."""
    from rl.preflight.doctor import examine
    from rl.quiet import quiet

    quiet()
    report = examine(arguments.overrides, arguments.config_dir, arguments.rollouts)
    for line in report.lines():
        print(line)
    return 2 if report.errors else 0


def _resume(arguments: Arguments) -> int:
    if arguments.target is None or arguments.overrides:
        raise ConfigError(
            "entrl resume takes a run folder and nothing else: entrl resume runs/NAME. With other settings: entrl train "
            "resume=auto run.name=NAME ..."
        )
    from rl.train import resume

    resume(Path(arguments.target))
    return 0


def help_text() -> str:
    """The help page; plug-ins and experiments are listed from the first comment of their yaml files."""
    from rl.paths import configs_dir

    def listing(folder: str, width: int) -> str:
        root = configs_dir() / folder
        names = {str(p.relative_to(root).with_suffix("")): _first_comment(p) for p in sorted(root.rglob("*.yaml"))}
        return "\n".join(f"  {name:<{width}} {comment}" for name, comment in names.items())

    return HELP.format(version=rl.__version__, plugins=listing("plugin", 14), experiments=listing("experiment", 24))


def _first_comment(path) -> str:
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in lines if not line.startswith("@package")), "")


if __name__ == "__main__":
    sys.exit(main())
