"""The command line, taken apart: a verb, plain words, overrides, flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rl.errors import ConfigError

_VALUES = {
    "--cfg": "job",
    "--config-dir": "FOLDER",
    "--out": "PATH",
    "--rollouts": "32",
    "--prompt": "TEXT",
    "--data": "gsm8k",
    "--html": "FILE",
    "--csv": "FILE",
    "--json": "FILE",
}
_REPEATED = ("--prompt",)
_EVERYWHERE = ("--cfg", "--config-dir")


@dataclass(frozen=True)
class Verb:
    """What may stand behind a verb beside overrides.

    Attributes:
        words: one of them comes first; ``optional_word``: or none of them. target: what a plain word behind that names, None where
            there is none; with a word of ``words`` it must be there. needs_target: without one too. many: several are welcome.
        flags: beside those that every verb has.
    """

    words: tuple[str, ...] = ()
    optional_word: bool = False
    target: str | None = None
    needs_target: bool = False
    many: bool = False
    flags: tuple[str, ...] = ()


VERBS = {
    "train": Verb(),
    "resume": Verb(target="a run folder, as runs/NAME", needs_target=True),
    "prepare": Verb(),
    "slurm": Verb(words=("submit",), flags=("--dry-run",)),
    "sweep": Verb(
        words=("status", "retry", "cancel"), optional_word=True, target="the folder of a sweep, as runs/NAME"
    ),
    "sync": Verb(target="a run folder or a folder of them, as runs/NAME", needs_target=True, many=True),
    "eval": Verb(target="a run folder, a saved model or a hub model", flags=("--out",)),
    "doctor": Verb(flags=("--rollouts",)),
    "report": Verb(target="a run folder, as runs/NAME", needs_target=True, flags=("--out",)),
    "lens": Verb(
        target="a run folder, a saved model or a hub model, or two of them",
        needs_target=True,
        many=True,
        flags=("--prompt", "--out"),
    ),
    "forks": Verb(target="a run folder, a saved model or a hub model", needs_target=True, flags=("--prompt", "--out")),
    "passport": Verb(target="a run folder, a saved model or a hub model", needs_target=True, flags=("--data", "--out")),
    "compare": Verb(
        target="run folders, sweeps or wandb:entity/project",
        needs_target=True,
        many=True,
        flags=("--html", "--csv", "--json", "--wandb"),
    ),
    "explain": Verb(),
    "rewards": Verb(words=("check",)),
    "new": Verb(words=("plugin",), target="a name, as my_idea", needs_target=True),
    "show": Verb(flags=("--full",)),
}


@dataclass(frozen=True)
class Arguments:
    """``word`` and ``targets`` as :class:`Verb` says; ``flags`` by name, with their value, all their values (--prompt) or True."""

    verb: str
    word: str | None = None
    targets: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str | list[str] | bool] = field(default_factory=dict)

    @property
    def target(self) -> str | None:
        return self.targets[0] if self.targets else None

    @property
    def config_dir(self) -> str | None:
        return self.flags.get("--config-dir")


def parse(argv: Sequence[str]) -> Arguments:
    """Flags may stand anywhere; everything with a ``=`` or a leading ``~`` is an override.

    Raises:
        ConfigError: an unknown verb or flag, a word too many, or one that is missing.
    """
    name, *left = argv
    if name not in VERBS:
        raise ConfigError(f"{name!r} is no verb. Expected one of {', '.join(VERBS)}; entrl --help shows examples.")
    verb, plain, overrides, flags = VERBS[name], [], [], {}
    while left:
        word = left.pop(0)
        key, equals, value = word.partition("=")
        if word.startswith("--"):
            if key not in (*_EVERYWHERE, *verb.flags):
                raise ConfigError(f"{word} is no option of entrl {name}. See entrl --help.")
            if key in _VALUES and not equals and not left:
                raise ConfigError(f"{key} needs a value: {key} {_VALUES[key]}.")
            found = (value if equals else left.pop(0)) if key in _VALUES else True
            flags[key] = [*flags.get(key, []), found] if key in _REPEATED else found
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        else:
            plain.append(word)
    word, targets = _places(name, verb, plain)
    if flags.get("--cfg", "job") != "job":
        raise ConfigError(f"--cfg {flags['--cfg']} is not known. Expected --cfg job.")
    if not str(flags.get("--rollouts", "1")).isdigit():
        raise ConfigError(
            f"--rollouts {flags['--rollouts']} is no number of problems. Expected one of at least 1, as --rollouts 32."
        )
    return Arguments(name, word, targets, overrides, flags)


def _places(name: str, verb: Verb, plain: list[str]) -> tuple[str | None, list[str]]:
    """The word that the verb begins with, and its targets."""
    word = plain.pop(0) if verb.words and plain and plain[0] in verb.words else None
    if verb.words and word is None and not verb.optional_word:
        got = f" {plain[0]}" if plain else ""
        raise ConfigError(f"entrl {name}{got} is not known. Expected entrl {name} {' or '.join(verb.words)}.")
    takes = verb.target is not None and (word is not None or not verb.words)
    if takes and not plain and (verb.needs_target or word is not None):
        behind = f"entrl {name} {word}" if word else f"entrl {name}"
        raise ConfigError(f"{behind} needs {verb.target}.")
    allowed = (len(plain) if verb.many else 1) if takes else 0
    if len(plain) > allowed == 1:
        raise ConfigError(f"entrl {name} takes one target, {verb.target}, and got {plain[1]!r} too.")
    if len(plain) > allowed:
        raise ConfigError(f"{plain[allowed]!r} is no override. Expected key=value, as trainer.max_steps=100.")
    return word, plain
