import json
import re
import subprocess
import sys

import pytest

from rl import rundir
from rl.errors import CheckpointError, ConfigError, RunExistsError
from rl.paths import find_model


def test_names_are_readable_and_unique():
    names = {rundir.run_name("tiny", "countdown", ["fork_mask", "steer"], 1) for _ in range(50)}
    assert len(names) > 45 and all(re.fullmatch(r"tiny_countdown_fork_mask\+steer_s1_[a-z]{4}", n) for n in names)
    assert rundir.run_name("tiny", "countdown", [], 2).startswith("tiny_countdown_grpo_s2_")


def test_an_existing_name_is_refused_with_ways_out_or_moved_aside(tmp_path):
    folder = rundir.create(tmp_path, "a", overwrite=False)
    (folder / "precious").write_text("1")
    with pytest.raises(RunExistsError, match="another run.name, or run.overwrite=true"):
        rundir.create(tmp_path, "a", overwrite=False)
    for n in (1, 2):
        assert not list(rundir.create(tmp_path, "a", overwrite=True).iterdir())
        assert (tmp_path / f"a.old-{n}").is_dir()
    assert (tmp_path / "a.old-1" / "precious").read_text() == "1"


def test_a_folder_that_is_being_trained_in_is_not_moved_aside(tmp_path):
    folder = rundir.create(tmp_path, "a", overwrite=False)
    code = f"import sys; from rl.rundir import hold; lock = hold({str(folder)!r}); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="is being trained by another process"):
        rundir.create(tmp_path, "a", overwrite=True)
    other.kill()
    other.communicate()
    rundir.create(tmp_path, "a", overwrite=True)


def test_a_run_describes_itself(tmp_path):
    rundir.describe(tmp_path, "seed: 1\n", ["plugin=[fork_mask]"], ["train", "plugin=[fork_mask]"], 1)
    assert (tmp_path / "command.sh").read_text() == "entrl train 'plugin=[fork_mask]'\n"
    rundir.update_manifest(tmp_path, {"wandb_id": "abc"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["trl"] and manifest["hardware"]["cpus"] and manifest["wandb_id"] == "abc"
    assert rundir.state(tmp_path) == "open"
    rundir.finish(tmp_path, "DONE")
    assert rundir.state(tmp_path) == "done"
    rundir.finish(tmp_path, "FAILED", "RewardError: x")
    assert (tmp_path / "FAILED").read_text() == "RewardError: x\n" and not (tmp_path / "DONE").exists()
    rundir.finish(tmp_path, "STOPPED", "SIGTERM at step 3")
    assert rundir.state(tmp_path) == "stopped"
    rundir.reopen(tmp_path)
    assert rundir.state(tmp_path) == "open"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_find_model(tmp_path):
    run, saved = tmp_path / "run", tmp_path / "saved"
    for folder in (run / "checkpoints" / "final", saved):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert find_model(str(run)) == str(run / "checkpoints" / "final")
    assert find_model(str(saved)) == str(saved)
    for step in (9, 100, 80):
        (run / "checkpoints" / f"checkpoint-{step}").mkdir()
        (run / "checkpoints" / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    (run / "checkpoints" / ".partial-checkpoint-110" / "checkpoint-110").mkdir(parents=True)
    assert find_model(str(run)) == str(run / "checkpoints" / "final")
    (run / "checkpoints" / "final" / "config.json").unlink()
    assert find_model(str(run)) == str(run / "checkpoints" / "checkpoint-100")
    assert find_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert find_model("builtin:countdown").endswith("countdown")


@pytest.mark.parametrize("target", ["{tmp}", "{tmp}/nothing", "./nothing", "builtin:gpt", "a/b/c", "name"])
def test_what_is_no_model(tmp_path, target):
    with pytest.raises(CheckpointError, match="Give|Known"):
        find_model(target.format(tmp=tmp_path))
