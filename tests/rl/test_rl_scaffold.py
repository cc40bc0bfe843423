"""``entrl new plugin``: what it writes works as it stands, in a folder of one's own and in a checkout, and it spoils nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import SMALL, entrl, fails
from rl.config import plugin_names

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that one stands in; modules made in it are forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pytest_of(*arguments, cwd):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_in_a_folder_of_ones_own_it_passes_its_test_and_trains(folder, capsys):
    assert entrl("new", "plugin", "my_idea") == 0
    said = capsys.readouterr().out
    assert files(folder) == ["configs/plugin/my_idea.yaml", "my_idea.py", "test_my_idea.py"]
    assert [line.strip() for line in said.partition("next:")[2].strip().splitlines()] == [
        "python -m pytest test_my_idea.py",
        "entrl train --config-dir configs 'plugin=[my_idea]' run.name=my_idea",
        "entrl report runs/my_idea",
    ]
    code, out = pytest_of("test_my_idea.py", cwd=folder)
    assert code == 0 and "23 passed" in out, out
    assert entrl("train", *SMALL, "--config-dir", "configs", "plugin=[my_idea]", "run.name=my_idea") == 0
    last = json.loads((folder / "runs" / "my_idea" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["plugin/my_idea/touched"] > 0 and 0 < last["plugin/my_idea/weight"] < 1
    assert (folder / "runs" / "my_idea" / "report.html").is_file()
    capsys.readouterr()
    assert entrl("explain", "--config-dir", "configs", "plugin=[my_idea]", "plugin.my_idea.power=2") == 0
    assert "w = min(1, H)^2" in capsys.readouterr().out


def test_the_test_it_writes_fails_of_a_broken_method(folder):
    assert entrl("new", "plugin", "my_idea") == 0
    method = folder / "my_idea.py"
    right = method.read_text()
    wrong = right.replace("** self.power", "** (self.power + 0.1)")
    method.write_text(wrong.replace("weight = weight.where(tokens.mask, 1.0)", "pass"))
    code, out = pytest_of("test_my_idea.py", cwd=folder)
    assert code == 1 and "test_weights_and_loss_by_hand" in out and "is_the_identity_at_neutral" in out
    assert "leaves_padding_alone" in out and "a weight outside the mask is not 1" in out


def test_another_config_dir(folder, capsys):
    assert entrl("new", "plugin", "my_idea", "--config-dir", "my configs") == 0
    assert files(folder) == ["my configs/plugin/my_idea.yaml", "my_idea.py", "test_my_idea.py"]
    assert "--config-dir 'my configs' 'plugin=[my_idea]'" in capsys.readouterr().out


def test_in_a_checkout_it_goes_where_the_others_are(tmp_path):
    """In a copy of the parts that matter: the method's own test, the contract laws, the rules about imports, ruff."""
    for name in ("rl", "rewards", "data", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    new = [sys.executable, "-m", "rl.cli", "new", "plugin", "my_idea"]
    done = subprocess.run(new, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = ["rl/plugins/my_idea.py", "configs/plugin/my_idea.yaml", "tests/plugins/test_my_idea.py"]
    assert all(path in done.stdout and (tmp_path / path).is_file() for path in written)
    tests = "tests/plugins/test_my_idea.py tests/test_contract_laws.py -k my_idea"
    assert f"python -m pytest {tests}\n  entrl train 'plugin=[my_idea]' run.name=my_idea" in done.stdout
    code, out = pytest_of(*tests.split(), "tests/test_layering.py", "-k", "my_idea or readable", cwd=tmp_path)
    assert code == 0 and "test_law" not in out and "failed" not in out, out
    ruff = [sys.executable, "-m", "ruff"]
    python = [path for path in written if path.endswith(".py")]
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([*ruff, *words, *python], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name, why",
    [
        ("My-Idea", "is no name of a plug-in"),
        ("1st", "is no name of a plug-in"),
        ("../idea", "is no name of a plug-in"),
        ("a" * 41, "is no name of a plug-in"),
        ("", "is no name of a plug-in"),
        ("class", "is a module or a word of Python itself"),
        ("json", "is a module or a word of Python itself"),
        ("null", "means something else"),
        ("on", "means something else"),
        ("nan", "means something else"),
        ("token_batch", "means something else"),
        ("torch", "is an installed module"),
        ("rewards", "is an installed module"),
        ("fork_mask", "ships with entrl"),
    ],
)
def test_refuses_a_name(folder, capsys, name, why):
    assert why in fails(capsys, "new", "plugin", name)
    assert not files(folder)


@pytest.mark.parametrize(
    "argv, why",
    [
        (["new"], "Expected entrl new plugin"),
        (["new", "reward", "mine"], "Expected entrl new plugin"),
        (["new", "plugin"], "needs a name"),
        (["new", "plugin", "a", "b"], "takes one target"),
        (["new", "plugin", "a", "seed=1"], "takes no overrides"),
    ],
)
def test_refuses_other_words(folder, capsys, argv, why):
    assert why in fails(capsys, *argv)
    assert not files(folder)


@pytest.mark.parametrize("taken", ["my_idea.py", "configs/plugin/my_idea.yaml", "test_my_idea.py"])
def test_overwrites_nothing(folder, capsys, taken):
    (folder / taken).parent.mkdir(parents=True, exist_ok=True)
    (folder / taken).write_text("mine")
    assert f"{taken} is there already" in fails(capsys, "new", "plugin", "my_idea")
    assert files(folder) == [taken] and (folder / taken).read_text() == "mine"


def test_replaces_no_link(folder, capsys):
    (folder / "my_idea.py").symlink_to("nowhere")
    assert "my_idea.py is there already" in fails(capsys, "new", "plugin", "my_idea")
    assert (folder / "my_idea.py").is_symlink() and not files(folder)


def test_leaves_nothing_behind_where_a_file_cannot_be_written(folder, capsys):
    (folder / "configs").write_text("a file where a folder is needed")
    assert "configs/plugin/my_idea.yaml cannot be written" in fails(capsys, "new", "plugin", "my_idea")
    assert files(folder) == ["configs"]


def test_a_method_of_ones_own_is_none_of_entrls(folder):
    assert entrl("new", "plugin", "my_idea") == 0
    assert "my_idea" not in plugin_names()
