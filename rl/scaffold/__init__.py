"""``entrl new plugin my_idea``: a method that works, its configuration and its test, to be changed into one of your own."""

from __future__ import annotations

import keyword
import os
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template

import yaml

from rl.config import override_value, plugin_names
from rl.errors import ConfigError
from rl.paths import configs_dir
from rl.rundir import write_text

_HERE = Path(__file__).parent
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_IMPORTED = ("ConfigError", "Explanation", "Mapping", "Signal", "TokenBatch")  # by the files written here


def new_plugin(name: str, config_dir: str | None) -> str:
    """Write the three files of a plug-in and say what to do next.

    In the folder of a checkout of entrl they go where its own plug-ins are; anywhere else, or with a ``config_dir``, into the current
    folder: ``<name>.py``, ``test_<name>.py`` and ``<config_dir>/plugin/<name>.yaml``, by default in ``configs``.

    Raises:
        ConfigError: a name that cannot be one or is taken, a file that is there already or cannot be written.
    """
    inside = config_dir is None and _in_checkout()
    title = "".join(word.capitalize() for word in name.split("_"))
    _check_name(name, title)
    files = _inside(name, title) if inside else _private(name, title, Path(config_dir or "configs"))
    for path in files:
        if os.path.lexists(path):  # a link that leads nowhere is somebody's too
            raise ConfigError(
                f"{path} is there already, and nothing is overwritten. Choose another name, or move it away."
            )
    if not inside and (found := find_spec(name)) and found.origin:
        raise ConfigError(
            f"{name} is an installed module ({found.origin}), which would hide yours. Choose another name."
        )
    _write(files)
    what = ("the method", "its settings", "its numbers by hand" + ("" if inside else ", and the contract laws"))
    width = max(len(str(path)) for path in files)
    lines = [f"{path!s:<{width}}  {line}" for path, line in zip(files, what, strict=True)]
    return "\n".join([*lines, "", "next:", *(f"  {line}" for line in _next(name, list(files), inside, config_dir))])


def _in_checkout() -> bool:
    root = configs_dir().parent
    return Path.cwd().resolve() == root.resolve() and (root / "tests" / "plugins").is_dir()


def _check_name(name: str, title: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > 40:
        raise ConfigError(
            f"{name!r} is no name of a plug-in. Expected up to 40 characters, a-z, 0-9 and _, as my_idea."
        )
    # Hydra and YAML read null, true, nan or on as something else than a word
    if override_value(f"x={name}") != name or yaml.safe_load(name) != name or title in _IMPORTED:
        raise ConfigError(f"{name} means something else in Python, YAML or Hydra. Choose another name, as my_{name}.")
    if name in sys.stdlib_module_names or name in keyword.kwlist:
        raise ConfigError(f"{name} is a module or a word of Python itself. Choose another name, as my_{name}.")
    if name in plugin_names():
        raise ConfigError(f"plugin={name} ships with entrl. Choose another name; known: {', '.join(plugin_names())}.")


def _inside(name: str, title: str) -> dict[Path, str]:
    words = {"name": name, "Class": title, "module": f"rl.plugins.{name}"}
    return {
        Path("rl", "plugins", f"{name}.py"): _text("method.py", words),
        Path("configs", "plugin", f"{name}.yaml"): _text("method.yaml", words),
        Path("tests", "plugins", f"test_{name}.py"): _text("test.py", words),
    }


def _private(name: str, title: str, configs: Path) -> dict[Path, str]:
    words = {"name": name, "Class": title, "module": name}
    test = _text("test.py", words).replace("import batch_from_logits", "import LAWS, batch_from_logits")
    # by itself, behind the libraries: here it is a module of its own
    own = f"from {name} import {title}\n"
    test = test.replace(own, "").replace("\nfrom rl.contract", f"\n{own}from rl.contract", 1)
    return {
        Path(f"{name}.py"): _text("method.py", words),
        configs / "plugin" / f"{name}.yaml": _text("method.yaml", words),
        Path(f"test_{name}.py"): test + _text("laws.py", words),
    }


def _text(template: str, words: Mapping[str, str]) -> str:
    return Template((_HERE / f"{template}.txt").read_text(encoding="utf-8")).substitute(words)


def _write(files: Mapping[Path, str]) -> None:
    written: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            written.append(path)
    except OSError as error:
        for whole in written:
            whole.unlink()
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{path} cannot be written: {reason}. Start from a folder of your own.") from error


def _next(name: str, files: list[Path], inside: bool, config_dir: str | None) -> list[str]:
    """Command lines from the files to a first curve."""
    tests = f"{files[2]} tests/test_contract_laws.py -k {name}" if inside else str(files[2])
    where = "" if inside else f"--config-dir {shlex.quote(config_dir or 'configs')} "
    return [
        f"python -m pytest {tests}",
        f"entrl train {where}'plugin=[{name}]' run.name={name}",
        f"entrl report runs/{name}",
    ]
