"""Wheel and editable install in a clean environment, from a folder that holds its own data/ and rewards/."""

import os
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | env
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout as git would clone it, so that building leaves nothing behind in ours."""
    folder = tmp_path_factory.mktemp("source") / "entrl"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "wandb", "__pycache__", ".*_cache", "dist", "build")
    shutil.copytree(ROOT, folder, ignore=ignore)
    (folder / "configs" / "local" / "default.yaml").write_text("# a site's own facts\n")
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


def environment(folder):
    """A virtual environment that sees this one's packages but not our entrl."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    mirror = folder / "packages"
    mirror.mkdir()
    for entry in Path(next(p for p in sys.path if p.endswith("site-packages"))).iterdir():
        if "entrl" not in entry.name:
            (mirror / entry.name).symlink_to(entry)
    (site / "packages.pth").write_text(f"{mirror}\n")
    return python


def someones_folder(tmp_path):
    """A working folder as researchers have them: with folders named like our packages."""
    for name in ("data", "rewards", "rl"):
        (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / "data" / "train.jsonl").write_text("{}\n")
    return tmp_path / "work"


def check_works(python, cwd):
    entrl = python.parent / "entrl"
    assert "fork_mask" in run(entrl, "--help", cwd=cwd)
    assert "rho: 0.2" in run(entrl, "show", "--full", cwd=cwd)
    out = run(entrl, "train", "dry_run=true", cwd=cwd, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert "nothing was trained or written" in out


def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").rglob("*.yaml"):
        relative = config.relative_to(ROOT / "configs")
        assert f"rl/_configs/{relative}" in names or relative.parts[0] == "local"
    assert "rl/assets/countdown/model.safetensors" in names and "rl/_slurm/README.md" in names
    assert {"rl/scaffold/method.py.txt", "rl/scaffold/method.yaml.txt", "rl/scaffold/test.py.txt"} <= set(names)
    assert {"rl/report/templates/base.html.j2", "rl/report/assets/base.js"} <= set(names)
    assert not any("local/default" in name or name.startswith(("tests/", "scripts/")) for name in names)


def test_wheel_install(wheel, tmp_path):
    python = environment(tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    work = someones_folder(tmp_path)
    check_works(python, work)
    check_a_method_of_ones_own(python, work)


def check_a_method_of_ones_own(python, cwd):
    """What ``entrl new plugin`` writes passes its test and gets as far as the training, as the commands it prints say."""
    entrl = python.parent / "entrl"
    said = run(entrl, "new", "plugin", "my_idea", cwd=cwd)
    assert {"my_idea.py", "test_my_idea.py", "configs"} <= {path.name for path in cwd.iterdir()}
    test, train = (next(line for line in said.splitlines() if word in line) for word in ("pytest", "entrl train"))
    assert "passed" in run(python, *shlex.split(test)[1:], cwd=cwd, OMP_NUM_THREADS="1")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    out = run(entrl, *shlex.split(train)[1:], "dry_run=true", cwd=cwd, **offline)
    assert "nothing was trained or written" in out


def test_editable_install(source, tmp_path):
    python = environment(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "-e", source, cwd=tmp_path)
    check_works(python, someones_folder(tmp_path))


def test_a_package_of_the_same_name_elsewhere_is_named(tmp_path):
    """python -c puts the working folder first: there, another `data` takes the place of ours."""
    other = tmp_path / "data"
    other.mkdir()
    (other / "__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "import rl"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert f"Python finds it in {tmp_path}" in done.stderr and "PYTHONSAFEPATH" in done.stderr


def fake_python(folder, version):
    path = folder / "oldpython"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit 1\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "env, message",
    [
        ({"PYTHON": "{old}"}, "is Python 3.8.1. entrl needs Python >= 3.11"),
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not found"),
        ({"ENTRL_SETUP_GIB": "1000000"}, "GiB are free"),
    ],
)
def test_setup_says_what_is_wrong(source, tmp_path, env, message):
    env = {k: v.format(old=fake_python(tmp_path, "3.8.1")) for k, v in env.items()}
    done = subprocess.run(
        ["bash", str(source / "scripts" / "setup.sh")], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 1 and message in done.stderr and not (source / ".venv").exists()
