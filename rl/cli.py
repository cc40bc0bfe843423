"""``entrl``: pure Hydra overrides after a verb. Heavy imports happen only once a verb needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import rl
from rl.arguments import Arguments, parse
from rl.errors import ConfigError, guarded
from rl.quiet import settle_environment

HELP = """entrl {version}: GRPO for language models, looking at and acting on the entropy of every token

usage: entrl VERB [key=value ...] [--config-dir DIR]

  train   fine-tune a model with RL
            entrl train
            entrl train plugin=[fork_mask,steer] model=qwen2.5_0.5b data=gsm8k plugin.steer.w_min=0.8
            entrl train engine=zero2 engine.processes=8 ...          several processes (docs/engines.md)
  resume  go on with a run that was stopped or killed, exactly, from its newest good checkpoint
            entrl resume runs/NAME                                   or entrl train resume=auto run.name=NAME ...
  sweep   run every combination of choices: here, some at a time, or as one Slurm job array
            entrl sweep plugin=[],[fork_mask],[steer] seed=1,2,3 launcher.at_once=2
            entrl sweep sweep=rho seed=1,2 launcher=slurm            a named sweep; what is on the line replaces its keys
            entrl sweep status|retry|cancel runs/NAME
  slurm   train on a cluster: write the run folder, submit its job (docs/slurm.md)
            entrl slurm submit engine=zero3 engine.nodes=2 model=qwen3_8b_base data=math slurm.gpus_per_node=8
            entrl slurm submit --dry-run                             only print the script
  prepare check, and write the run folder that torchrun -m rl.rank RUN starts on any number of nodes
            entrl prepare engine=zero3 engine.nodes=2 engine.processes=8 model=qwen3_8b_base data=math
  sync    deliver to W&B what it lacks of runs that were offline, cut off or resumed
            entrl sync runs/NAME                                     a run folder, or a folder of them
  eval    sample a run folder, a saved model or a hub model on held-out problems
            entrl eval runs/NAME eval.samples=32 'eval.ks=[1,8,32]'
            entrl eval Qwen/Qwen2.5-0.5B 'eval.sets=[gsm8k,math500]'
  report  one page of a run: reward, pass@k, entropy, what each method touched, where the time went
            entrl report runs/NAME
  lens    every token of a completion by its entropy, rank, weight and alternatives, over the training
            entrl lens runs/NAME                                     entrl lens runs/A runs/B
            entrl lens Qwen/Qwen2.5-0.5B --prompt "What is 17 * 23?"
  forks   what a decision is worth: the alternatives at the most uncertain tokens, and how often each leads to success
            entrl forks runs/NAME
            entrl forks Qwen/Qwen2.5-0.5B data=gsm8k forks.samples=32
  compare final numbers with intervals over seeds, the settings that differ, curves, a paired test of methods
            entrl compare runs/A runs/B                              run folders, sweeps, wandb:entity/project
            entrl compare runs/sweep --html compare.html --csv compare.csv
  passport  the entropy of a model before any training: histogram, forking vocabulary, pass@k
            entrl passport Qwen/Qwen2.5-0.5B --data gsm8k
  explain print the exact objective that a configuration trains, with its numbers
            entrl explain plugin=[fork_mask,steer] trainer.loss_type=dr_grpo
  doctor  say everything that is going to go wrong before a night is lost; needs no GPU, key or network
            entrl doctor model=qwen2.5_0.5b data=gsm8k
            entrl doctor --rollouts 32                               also sample, and suggest rho and entropy targets
  rewards check whether rewards tell right from wrong on the data
            entrl rewards check data=math500 data.path=math500.parquet
  new     write a method of your own to start from: its file, its settings, its test (docs/your-own-method.md)
            entrl new plugin my_idea                                 in the current folder, or in a checkout of entrl
            entrl new plugin my_idea --config-dir my_configs
  show    print what an experiment or override changes against the default (--full: everything)
            entrl show experiment=paper/steer
            entrl show --full plugin=[steer]

  --cfg job         print the resolved configuration and stop      --config-dir DIR  add your own groups, as DIR/plugin/my_idea.yaml
  dry_run=true      do everything but the training                 --version

plug-ins, run in the order given, plugin=[a,b]; plugin=[] is plain GRPO:
{plugins}

experiments, experiment=NAME (add scale=tiny for the embedded model and task):
{experiments}

sweeps, entrl sweep sweep=NAME:
{sweeps}

Files of a run: runs/NAME/. ENTRL_DEBUG=1 shows tracebacks. Documentation: README.md and docs/."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; docs/engines.md lists the exit codes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(f"entrl {rl.__version__}")
        return 0
    return guarded(_run, argv)


def _run(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    settle_environment()
    if "--cfg" in arguments.flags:
        return _show(arguments, full=True)
    return _VERBS[arguments.verb](arguments, argv)


def _train(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.config import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    from rl.train import run

    run(cfg, arguments.overrides, argv)
    return 0


def _resume(arguments: Arguments, argv: Sequence[str]) -> int:
    if arguments.overrides:
        raise ConfigError(
            "entrl resume takes a run folder and nothing else: entrl resume runs/NAME. With other settings: entrl train "
            "resume=auto run.name=NAME ..."
        )
    from rl.train import resume

    resume(Path(arguments.target))
    return 0


def _prepare(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.config import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    from rl.prepare import prepare
    from rl.quiet import quiet

    quiet()
    print(prepare(cfg, arguments.overrides, argv, here=False))
    return 0


def _slurm(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.config import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    from rl.slurm import submit_run

    submit_run(cfg, arguments.overrides, argv, show="--dry-run" in arguments.flags or cfg.dry_run)
    return 0


def _sweep(arguments: Arguments, argv: Sequence[str]) -> int:
    word, target = arguments.word, arguments.target
    if word in ("status", "cancel"):
        if arguments.overrides:
            raise ConfigError(f"entrl sweep {word} takes no overrides, and got {arguments.overrides[0]}.")
        from rl.sweep.status import cancel, show_status

        return show_status(target) if word == "status" else cancel(target)
    if word is None and not arguments.overrides:
        raise ConfigError("entrl sweep needs choices, as seed=1,2,3 or sweep=rho. entrl --help lists the named ones.")
    from rl.quiet import quiet
    from rl.sweep.verb import retry, sweep

    quiet()
    if word == "retry":
        return retry(target, arguments.overrides)
    return sweep(arguments.overrides, arguments.config_dir, argv)


def _sync(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.sync import sync

    return sync(arguments.targets)


def _eval(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.eval_run import config_for, run_eval

    cfg = config_for(arguments.target, arguments.overrides, arguments.config_dir)
    run_eval(arguments.target, cfg, arguments.flags.get("--out"), arguments.overrides)
    return 0


def _report(arguments: Arguments, argv: Sequence[str]) -> int:
    _no_overrides(arguments)
    from rl.report.run_page import write_report

    print(write_report(Path(arguments.target), _out(arguments)))
    return 0


def _lens(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.study.lens import show_lens

    prompts = arguments.flags.get("--prompt", [])
    print(show_lens(arguments.targets, prompts, arguments.overrides, arguments.config_dir, _out(arguments)))
    return 0


def _forks(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.study.forks import show_forks

    prompts = arguments.flags.get("--prompt", [])
    print(show_forks(arguments.target, prompts, arguments.overrides, arguments.config_dir, _out(arguments)))
    return 0


def _passport(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.study.passport import show_passport

    data = arguments.flags.get("--data")
    overrides = [*([f"data={data}"] if data else []), *arguments.overrides]
    print(show_passport(arguments.target, overrides, arguments.config_dir, _out(arguments)))
    return 0


def _compare(arguments: Arguments, argv: Sequence[str]) -> int:
    _no_overrides(arguments)
    from rl.report.compare import show_comparison

    files = {kind: Path(f) for kind in ("html", "csv", "json") if (f := arguments.flags.get(f"--{kind}"))}
    show_comparison(arguments.targets, files, wandb="--wandb" in arguments.flags)
    return 0


def _explain(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.config import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    from rl.explain import explain

    print(explain(cfg))
    return 0


def _out(arguments: Arguments) -> Path | None:
    return Path(arguments.flags["--out"]) if "--out" in arguments.flags else None


def _no_overrides(arguments: Arguments) -> None:
    if arguments.overrides:
        raise ConfigError(f"entrl {arguments.verb} takes no overrides, and got {arguments.overrides[0]}.")


def _doctor(arguments: Arguments, argv: Sequence[str]) -> int:
    """Print the report; 2 when there is something to mend."""
    from rl.preflight.doctor import examine
    from rl.quiet import quiet

    quiet()
    report = examine(arguments.overrides, arguments.config_dir, int(arguments.flags.get("--rollouts", 0)))
    for line in report.lines():
        print(line)
    return 2 if report.errors else 0


def _rewards(arguments: Arguments, argv: Sequence[str]) -> int:
    from rl.config import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    from rl.preflight.doctor import check_rewards

    return check_rewards(cfg)


def _new(arguments: Arguments, argv: Sequence[str]) -> int:
    _no_overrides(arguments)
    from rl.scaffold import new_plugin

    print(new_plugin(arguments.target, arguments.config_dir))
    return 0


def _show(arguments: Arguments, argv: Sequence[str] = (), full: bool = False) -> int:
    from omegaconf import OmegaConf

    from rl.config import compose, differences

    cfg = compose(arguments.overrides, arguments.config_dir)
    if full or "--full" in arguments.flags:
        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    for key, (default, value) in differences(cfg, compose()).items():
        print(f"{key}: {default} -> {value}")
    return 0


_VERBS = {
    "train": _train,
    "resume": _resume,
    "prepare": _prepare,
    "slurm": _slurm,
    "sweep": _sweep,
    "sync": _sync,
    "eval": _eval,
    "report": _report,
    "lens": _lens,
    "forks": _forks,
    "compare": _compare,
    "passport": _passport,
    "explain": _explain,
    "doctor": _doctor,
    "rewards": _rewards,
    "new": _new,
    "show": _show,
}


def help_text() -> str:
    """The help page; plug-ins, experiments and sweeps are listed from the first comment of their yaml files."""
    from rl.paths import configs_dir

    def listing(folder: str, width: int) -> str:
        root = configs_dir() / folder
        names = {str(p.relative_to(root).with_suffix("")): _first_comment(p) for p in sorted(root.rglob("*.yaml"))}
        return "\n".join(f"  {name:<{width}} {comment}" for name, comment in names.items())

    return HELP.format(
        version=rl.__version__,
        plugins=listing("plugin", 14),
        experiments=listing("experiment", 24),
        sweeps=listing("sweep", 24),
    )


def _first_comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in lines if not line.startswith("@package")), "")


if __name__ == "__main__":
    sys.exit(main())
