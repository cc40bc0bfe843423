"""What the documentation tells people to type works as it stands there."""

import re
from pathlib import Path

import pytest

from rl.cli import main
from rl.config import compose, plugin_names
from rl.series import _NAMES

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "your-own-method.md").read_text()


def block(after, language):
    """The first code block of a language after a file's name."""
    return re.search(rf"`{re.escape(after)}`\n\n```{language}\n(.*?)```", GUIDE, re.DOTALL)[1]


def test_the_guide_shows_what_entrl_new_plugin_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "plugin", "my_idea"]) == 0
    for name, language in (
        ("my_idea.py", "python"),
        ("configs/plugin/my_idea.yaml", "yaml"),
        ("test_my_idea.py", "python"),
    ):
        assert (tmp_path / name).read_text() == block(name, language), name


def test_the_readme_is_short_and_names_every_plugin():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert all(f"| `{name}` |" in readme for name in plugin_names())


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("line", re.findall(r"^    entrl train (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE))
def test_command_lines_of_the_readme_compose(line):
    import shlex

    words = [w for w in shlex.split(line, comments=True) if w != "..."]
    compose(words)


def test_every_series_of_the_trainer_is_explained():
    glossary = (ROOT / "docs" / "metrics.md").read_text()
    for name in _NAMES.values():
        group, _, leaf = name.partition("/")
        assert f"{group}/" in glossary and leaf in glossary, name
