"""Run folders before and between their starts: what is refused, what a second start may change."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from command_line import SMALL, fails, metrics, train
from rl.config import compose
from rl.engine import engine
from rl.errors import REQUEUE, CheckpointError, ConfigError, Stopped
from rl.options import batch_algebra
from rl.preflight.settings import world
from rl.prepare import prepare, read, refuse_secrets, to_resume, write


def asked(tmp_path, *overrides):
    return compose([f"run.dir={tmp_path}", "run.name=it", "resume=auto", *overrides])


@pytest.fixture
def folder(tmp_path):
    cfg = asked(tmp_path)
    return write(cfg, [], ["train"], engine(cfg))


def test_the_folder_holds_the_configuration(tmp_path, folder):
    assert read(folder) == asked(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "overrides.txt", "command.sh", "manifest.json"}
    cfg = compose([f"run.dir={tmp_path}", "engine=zero2", "engine.processes=2"])
    named = write(cfg, [], ["train"], engine(cfg))
    assert read(named).run.name == named.name and "stage" in (named / "deepspeed.json").read_text()


def test_only_a_run_that_is_there_goes_on(tmp_path, folder):
    assert to_resume(asked(tmp_path)) == folder
    assert to_resume(asked(tmp_path, "resume=never")) is None
    assert to_resume(asked(tmp_path, "run.name=other")) is None
    for overrides, says in (
        (["run.name=null"], "does not know which run"),
        (["resume=yes"], "Expected auto or never"),
        (["trainer.beta=0.5"], "was started with trainer.beta=0.0, not 0.5. Give"),
        (["seed=2"], "was started with seed=1, not 2 and [12] more"),
        (["engine=ddp", "engine.processes=2"], "was started with engine"),
    ):
        with pytest.raises(ConfigError, match=says):
            to_resume(asked(tmp_path, *overrides))
    assert read(folder) == asked(tmp_path)


def test_what_computes_nothing_may_change_but_not_in_a_dry_run(tmp_path, folder):
    longer = asked(tmp_path, "trainer.max_steps=999", "checkpoint.every=7", "logger.mode=disabled")
    to_resume(OmegaConf.merge(longer, {"dry_run": True}))
    assert read(folder) == asked(tmp_path)
    assert to_resume(longer) == folder and read(folder) == longer


def test_a_run_goes_on_that_an_earlier_entrl_began(tmp_path, folder):
    config = read(folder)
    for group in ("forks", "passport", "alarm"):
        config.pop(group)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert to_resume(asked(tmp_path)) == folder and read(folder) == asked(tmp_path)


def test_a_run_that_is_going_on_keeps_its_configuration(tmp_path, folder):
    code = f"import sys; from rl.rundir import hold; lock = hold({str(folder)!r}); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="is being trained by another process"):
        to_resume(asked(tmp_path, "trainer.max_steps=999"))
    other.communicate("")
    assert read(folder) == asked(tmp_path)


def test_a_processes_number_that_was_counted_stays(tmp_path):
    cfg = asked(tmp_path, "engine=zero2")
    write(
        OmegaConf.merge(cfg, {"engine": {"processes": 4}}),
        [],
        ["train"],
        engine(asked(tmp_path, "engine=zero2", "engine.processes=4")),
    )
    assert to_resume(cfg) == tmp_path / "it" and read(tmp_path / "it").engine.processes == 4


def test_half_a_folder_and_an_edited_one_are_named(tmp_path, folder):
    for text, what in (("engine: [", "while parsing"), ("seed: 1", "run is missing")):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=rf"cannot be used: {what}.*Was it edited\?"):
            to_resume(asked(tmp_path))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="was not written to its end. Delete it"):
        to_resume(asked(tmp_path))


def test_secrets_are_refused_where_other_processes_would_need_them():
    refuse_secrets(compose())
    with pytest.raises(ConfigError, match="is a secret"):
        refuse_secrets(OmegaConf.merge(compose(), {"trainer": {"hub_token": "hf_abcdefgh"}}))


def test_a_run_for_other_machines_is_checked_as_one_of_their_size(tmp_path):
    """A node has eight GPUs there and this machine none: a group of eight from one completion a device fits."""
    fits = [
        "engine=zero2",
        "slurm.gpus_per_node=8",
        "trainer.per_device_train_batch_size=1",
        "trainer.num_generations=8",
    ]
    cfg = compose([f"run.dir={tmp_path}", "run.name=far", *fits])
    assert world(cfg, here=False) == 8
    assert read(prepare(cfg, [], ["prepare"], here=False)).engine.processes == 8


@pytest.mark.parametrize(("batch", "steps", "part"), [(16, 1, 8), (4, 1, 4), (4, 2, 8), (6, 2, 4)])
def test_how_much_of_a_group_a_reward_gets(batch, steps, part):
    sizes = [f"trainer.per_device_train_batch_size={batch}", f"trainer.steps_per_generation={steps}"]
    assert batch_algebra(compose([*sizes, "trainer.num_generations=8"]).trainer, 4).group_on_a_rank == part


def test_what_would_fail_in_the_ranks_is_found_before(tmp_path, capsys):
    split = ["engine=ddp", "engine.processes=4", "trainer.per_device_train_batch_size=4", "reward=[majority_vote]"]
    where = [f"run.dir={tmp_path}/runs", "run.name=it"]
    assert "the group is split over ranks" in fails(capsys, "train", *SMALL[:1], *split, *where)
    sharded = ["engine=zero3", "engine.processes=2", "plugin=[entropy_band]", "plugin.entropy_band.kl_coef=0.1"]
    assert "weights that are sharded (here by ZeRO-3)" in fails(capsys, "train", *SMALL, *sharded, *where)
    nodes = ["engine=ddp", "engine.processes=2", "engine.nodes=2"]
    assert "Use entrl slurm submit, or entrl prepare" in fails(capsys, "train", *nodes, *where)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_run_that_is_there_starts_nothing(tmp_path, folder, capsys):
    assert train(tmp_path, "resume=auto", "dry_run=true") == 2  # other settings
    capsys.readouterr()
    from rl.cli import main

    assert main(["train", f"run.dir={tmp_path}", "run.name=it", "resume=auto", "dry_run=true"]) == 0
    assert f"{folder} would go on from its beginning" in capsys.readouterr().out and not (folder / "logs").exists()


def test_a_stop_in_the_evaluation_after_the_training_loses_nothing(tmp_path, capsys, monkeypatch):
    from rl import train as training

    evaluate, asked = training.evaluate_sets, ["checkpoint.every=null", "eval.before=false", "resume=auto"]

    def stopped(cfg, sets, folder, names, *rest):
        raise Stopped("a signal while drawing completions")

    monkeypatch.setattr(training, "evaluate_sets", stopped)
    assert train(tmp_path, *asked) == REQUEUE
    checkpoints = tmp_path / "it" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "final"}
    assert "a signal while drawing" in (tmp_path / "it" / "STOPPED").read_text()
    written = (checkpoints / "final" / "model.safetensors").stat().st_mtime_ns  # what samples are known by
    monkeypatch.setattr(training, "evaluate_sets", evaluate)
    assert train(tmp_path, *asked) == 0 and (tmp_path / "it" / "DONE").exists()
    assert (checkpoints / "final" / "model.safetensors").stat().st_mtime_ns == written
    assert len(metrics(tmp_path / "it")) == 2 and "after" in (tmp_path / "it" / "summary.json").read_text()
    with open(tmp_path / "it" / "metrics.jsonl", "a") as file:  # of a step that no checkpoint has
        file.write('{"step": 3}\n')
    assert train(tmp_path, *asked, "trainer.max_steps=3") == 0
    assert [line["step"] for line in metrics(tmp_path / "it")] == [1, 2, 3]
    assert (checkpoints / "final" / "model.safetensors").stat().st_mtime_ns > written


def test_a_final_model_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    from rl.trainer import EntropyTrainer

    def full(self, folder, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EntropyTrainer, "save_model", full)
    said = fails(
        capsys, "train", *SMALL, f"run.dir={tmp_path}", "run.name=it", "eval.before=false", "checkpoint.every=null"
    )
    assert "checkpoints/final could not be written" in said and "No space left" in said
    assert (tmp_path / "it" / "FAILED").is_file() and not (tmp_path / "it" / "checkpoints" / "final").exists()
