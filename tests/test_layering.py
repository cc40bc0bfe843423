"""Who may import whom (the rules are in CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"rl", "rewards", "data"}
HEAVY = {"torch", "transformers", "trl", "datasets", "hydra", "omegaconf", "wandb", "pandas", "rich"}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path, **kwargs):
    return {name.split(".")[0] for name in imports(path, **kwargs)}


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("rewards") + files("data"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rewards_and_data_know_neither_torch_nor_each_other(path):
    own = path.relative_to(ROOT).parts[0]
    assert not roots(path) & (OURS | {"torch"} - {own}) - {own}


def test_rl_meets_rewards_and_data_in_the_composition_root_only():
    meeting = {str(p.relative_to(ROOT)) for p in files("rl") if roots(p) & {"rewards", "data"}}
    assert meeting <= {
        "rl/build.py",
        "rl/problems.py",
        "rl/preflight/tasks.py",
        "rl/preflight/probe.py",
        "rl/errors.py",
    }  # errors: all that are the user's


@pytest.mark.parametrize("path", files("rl/plugins"), ids=lambda p: p.stem)
def test_plugins_know_the_contract_and_torch_only(path):
    allowed = (
        "rl.contract",
        "rl.reduce",
        "rl.errors",
        *(f"rl.plugins.{name}" for name in ("checks", "steps", "windows")),
    )
    assert all(name.startswith(allowed) for name in imports(path) if name.startswith("rl."))
    assert not roots(path) & {"trl", "transformers", "hydra", "omegaconf", "wandb", "datasets"}


def test_only_reduce_knows_torch_distributed():
    assert {p.name for p in files("rl") if any(n.startswith("torch.distributed") for n in imports(p))} == {"reduce.py"}


def test_only_config_and_its_neighbours_know_hydra():
    assert {p.name for p in files("rl") if "hydra" in roots(p)} <= {"config.py", "build.py"}


def test_reports_read_run_folders_without_torch_or_a_trainer():
    for path in files("rl/report"):
        assert not roots(path) & {"torch", "trl", "transformers", "datasets"}, path
        allowed = (
            "rl.report",
            "rl.rundir",
            "rl.errors",
            "rl.wandb_run",
            "rl.redact",
            "rl.paths",
            "rl.forecast",
            "rl.shadows",
            "rl.estimators",
            "rl.shadows",
            "rl.sweep.read",
            "rl.config",
        )
        assert all(name.startswith(allowed) for name in imports(path) if name.startswith("rl.")), path


def test_the_command_line_imports_nothing_heavy():
    for name in ("cli.py", "__init__.py", "errors.py", "paths.py"):
        assert not roots(ROOT / "rl" / name, top_level_only=True) & HEAVY


def test_nobody_imports_scripts_tests_or_cli():
    for path in [p for folder in OURS for p in files(folder)]:
        assert not roots(path) & {"scripts", "tests"} and "rl.cli" not in set(imports(path))


def test_no_module_hides_a_module_of_the_standard_library():
    import sys

    for path in [p for folder in OURS for p in files(folder)]:
        assert path.stem in {"__init__"} or path.stem not in sys.stdlib_module_names, path


def test_files_stay_readable():
    for path in [p for folder in (*OURS, "scripts") for p in files(folder)]:
        assert len(path.read_text().splitlines()) <= 400, f"{path} has a second idea that wants its own file"
