"""What the documentation tells people to type works as it stands there."""

import json
import re
import subprocess
import sys
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


def test_the_method_of_the_guide_trains_from_a_private_folder(tmp_path, monkeypatch):
    (tmp_path / "my_lab.py").write_text(block("rl/plugins/doubt.py", "python"))
    (tmp_path / "configs" / "plugin").mkdir(parents=True)
    yaml = block("configs/plugin/doubt.yaml", "yaml").replace("rl.plugins.doubt", "my_lab")
    (tmp_path / "configs" / "plugin" / "doubt.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path)
    small = ["debug=two_steps", "trainer.per_device_train_batch_size=16", "data.train.count=32", "data.heldout.count=4"]
    where = [f"run.dir={tmp_path}/runs", "run.name=it", "--config-dir", f"{tmp_path}/configs"]
    assert main(["train", *small, "plugin=[fork_mask,doubt]", "plugin.doubt.power=0.5", *where]) == 0
    last = json.loads((tmp_path / "runs" / "it" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["plugin/doubt/touched"] > 0 and 0 < last["plugin/doubt/weight"] < 1


def test_the_test_of_the_guide_passes(tmp_path):
    package = tmp_path / "my_lab.py"
    package.write_text(block("rl/plugins/doubt.py", "python"))
    test = block("tests/plugins/test_doubt.py", "python").replace("rl.plugins.doubt", "my_lab")
    (tmp_path / "test_doubt.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_doubt.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


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
