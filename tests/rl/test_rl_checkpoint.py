"""Checkpoint folders without a model: whole or not there, verified, pruned, and the records that belong to them."""

import json
import shutil
import warnings

import pytest

from rl.checkpoint import Checkpoints, check_processes, flaw_of, found, manifest_of, newest_good, rewind
from rl.errors import CheckpointError, ConfigError

FACTS = {"engine": "ddp"}


def write(checkpoints, step, world=1):
    """What a trainer does: files of several sizes, one of them in a folder."""
    checkpoints.open(step)
    folder = checkpoints.partial(step) / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 200)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"optimizer" * 300)
    (folder / "empty").touch()
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return checkpoints.commit(step, world, FACTS)


def some(folder, *steps, every=None, keep_last=None, keep_every=None):
    checkpoints = Checkpoints(folder, every=every, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        write(checkpoints, step)
    return checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_appears_whole_and_says_what_it_is(tmp_path):
    checkpoints = some(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4"]
    manifest = manifest_of(tmp_path / "checkpoint-4")
    assert (manifest["step"], manifest["processes"], manifest["facts"]) == (4, 1, FACTS)
    assert list(manifest["files"]) == ["empty", "global_step/optimizer.pt", "model.safetensors"]
    assert manifest["files"]["global_step/optimizer.pt"]["bytes"] == 2700
    # of an empty input, from the algorithm's own test vectors
    assert manifest["files"]["empty"]["xxh3_128"] == "99aa06d3014798d86001c324468d497f"
    assert checkpoints.newest_good(1) == tmp_path / "checkpoint-4" and flaw_of(tmp_path / "checkpoint-4") is None


def test_what_is_under_way_is_no_checkpoint_and_goes_at_the_next_start(tmp_path):
    checkpoints = some(tmp_path, 4)
    checkpoints.open(8)
    (checkpoints.partial(8) / "checkpoint-8").mkdir()
    assert newest_good(tmp_path) == tmp_path / "checkpoint-4" and [step for step, _ in found(tmp_path)] == [4]
    checkpoints.start(4)
    assert names(tmp_path) == ["checkpoint-4"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped": (lambda c: flip(c / "model.safetensors"), "model.safetensors has other bytes than were written"),
    "truncated": (lambda c: truncate(c / "global_step/optimizer.pt"), "optimizer.pt has 2,699 bytes instead of 2,700"),
    "missing": (lambda c: (c / "empty").unlink(), "empty is missing"),
    "no manifest": (lambda c: (c / "entrl.json").unlink(), "entrl.json is missing or damaged"),
    "torn manifest": (
        lambda c: truncate(c / "entrl.json") or truncate(c / "entrl.json"),
        "entrl.json is missing or dam",
    ),
    "manifest of nothing": (lambda c: (c / "entrl.json").write_text("[]"), "entrl.json is missing or damaged"),
    "another's manifest": (
        lambda c: shutil.copy(c.parent / "checkpoint-4/entrl.json", c),
        "entrl.json is that of step 4",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_said_and_the_one_before_it_taken(tmp_path, damage):
    some(tmp_path, 4, 8)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "checkpoint-8")
    with pytest.warns(UserWarning, match=f"checkpoint-8 is broken: .*{message}.* The checkpoint before it is tried"):
        assert newest_good(tmp_path) == tmp_path / "checkpoint-4"


def test_newest_means_the_highest_step_and_none_is_none(tmp_path):
    assert newest_good(tmp_path / "nowhere") is None and newest_good(tmp_path) is None
    some(tmp_path, 9, 100, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_good(tmp_path) == tmp_path / "checkpoint-100"
    for step in (9, 100, 20):
        flip(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.warns(UserWarning) as said:
        assert newest_good(tmp_path) is None
    assert len(said) == 3


def test_another_number_of_processes_is_refused_with_the_way_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=None, keep_last=1)
    path = write(checkpoints, 4, world=8)
    assert checkpoints.newest_good(8) == path
    message = f"was written by 8 processes, now there is 1.*the same number.*model.path={path}"
    with pytest.raises(ConfigError, match=message):
        checkpoints.newest_good(1)
    with pytest.raises(CheckpointError, match="holds no entrl.json.*RUN/checkpoints/checkpoint-<step>"):
        check_processes(tmp_path, 1)


@pytest.mark.parametrize(
    "keep, left",
    [
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 3, "keep_every": 50}, [30, 40, 50]),
        ({"keep_last": None}, [10, 20, 30, 40, 50]),
    ],
)
def test_which_checkpoints_stay(tmp_path, keep, left):
    some(tmp_path, 10, 20, 30, 40, 50, **keep)
    assert [step for step, _ in found(tmp_path)] == left and len(names(tmp_path)) == len(left)


def test_going_on_from_an_earlier_one_sets_later_ones_aside_so_that_pruning_keeps_a_good_one(tmp_path):
    checkpoints = some(tmp_path, 4, 8, 12, keep_last=3)
    checkpoints.keep_last = 1
    for step in (8, 12):
        flip(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    checkpoints.start(4)
    assert names(tmp_path) == ["aside-checkpoint-12", "aside-checkpoint-8", "checkpoint-4"]
    write(checkpoints, 6)
    assert newest_good(tmp_path) == tmp_path / "checkpoint-6"
    write(checkpoints, 8)
    write(checkpoints, 8)  # again: the one there before is not lost
    assert newest_good(tmp_path) == tmp_path / "checkpoint-8" and "aside-checkpoint-8" in names(tmp_path)


def test_due():
    checkpoints = Checkpoints("x", every=3, keep_last=1)
    assert [step for step in range(1, 8) if checkpoints.due(step)] == [3, 6]
    assert not Checkpoints("x", every=None, keep_last=1).due(3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"every": 0, "keep_last": 1}, "checkpoint.every=0 does not work"),
        ({"every": 2.5, "keep_last": 1}, "checkpoint.every=2.5 does not work"),
        ({"every": True, "keep_last": 1}, "checkpoint.every=True"),
        ({"every": 1, "keep_last": 0}, "checkpoint.keep_last=0 does not work. Expected a whole number from 1 on"),
        ({"every": 50, "keep_last": 1, "keep_every": 75}, "no multiple of checkpoint.every=50.*keep_every=100"),
    ],
)
def test_settings_that_do_not_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoints("x", **settings)


def test_records_go_back_to_the_step_of_the_checkpoint(tmp_path):
    line = '{{"step": {}, "entropy/mean": 1.5}}\n'.format
    metrics, rollouts, probes = (tmp_path / name for name in ("metrics.jsonl", "rollouts", "probes"))
    rollouts.mkdir()
    probes.mkdir()
    for step in (0, 10, 20):
        (probes / f"step_{step:06d}.parquet").touch()
    for name in (
        "step_000001.parquet",
        "step_000010.parquet",
        "step_000010.rank1.parquet",
        "step_000020.rank1.parquet",
    ):
        (rollouts / name).touch()
    (rollouts / "step_000011.partial").touch()
    metrics.write_text(line(9) + line(10) + line(11) + '{"step": 12, "entr')
    rewind(tmp_path, 10)
    assert metrics.read_text() == line(9) + line(10)
    assert names(rollouts) == ["step_000001.parquet", "step_000010.parquet", "step_000010.rank1.parquet"]
    before = metrics.stat().st_mtime_ns
    rewind(tmp_path, 10)
    assert metrics.stat().st_mtime_ns == before and names(tmp_path) == ["metrics.jsonl", "probes", "rollouts"]
    assert names(probes) == ["step_000000.parquet", "step_000010.parquet"]
    rewind(tmp_path, 0)
    assert metrics.read_text() == "" and names(rollouts) == [] and names(probes) == ["step_000000.parquet"]
    rewind(tmp_path / "rollouts", 0)  # nothing was written yet


def test_a_torn_last_line_goes_even_where_its_step_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "x"')
    rewind(tmp_path, 5)
    assert [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 1}]


def test_the_final_model_is_whole_or_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=None, keep_last=None)
    assert checkpoints.final_step() is None
    for step in (3, 5):
        partial = tmp_path / ".partial-final"
        partial.mkdir()
        for name in ("model.safetensors", "training_args.bin"):
            (partial / name).write_text(str(step))
        checkpoints.commit_final(partial, step)
        assert checkpoints.final_step() == step and (tmp_path / "final" / "model.safetensors").read_text() == str(step)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "training_args.bin").exists()
    (tmp_path / ".partial-final").mkdir()
    checkpoints.start(5)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    (tmp_path / "final" / "entrl.json").write_text("torn")
    assert checkpoints.final_step() is None
