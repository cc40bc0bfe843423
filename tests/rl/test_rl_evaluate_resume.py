"""A killed evaluation goes on where it was, and ends with the samples it would have had."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from data import countdown
from rewards.countdown import final_answers, solved
from rl.draw import Decoding
from rl.errors import CheckpointError
from rl.evaluate import Kept, evaluate
from rl.samples import Store, model_fact
from tiny import save_model

ROWS = countdown.dataset("heldout", [3], 6, seed=0, distinct=True).to_list()
DRAWN = ["problem", "sample", "completion", "tokens", "truncated", "mean_entropy", "token_entropy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("m"))


def run(model_folder, out, progress=None, rows=ROWS, grader=solved, notes=None, **changes):
    options = {"max_new_tokens": 8, "batch_size": 8, **changes}
    seed, samples = options.pop("seed", 0), options.pop("samples", 4)
    facts = {"files": model_fact(str(model_folder), None)}
    return evaluate(
        AutoModelForCausalLM.from_pretrained(model_folder),
        countdown.tokenizer(),
        rows,
        grader,
        final_answers,
        Decoding(**options),
        samples=samples,
        ks=(1,),
        seed=seed,
        kept=None if out is None else Kept(Path(out), "it", facts, ([] if notes is None else notes).append),
        progress=progress,
    )


def nothing_is_drawn(drawn):
    assert drawn.samples == 0


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from test_rl_evaluate_resume import run

def kill(drawn):
    if drawn.batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)

run(sys.argv[1], sys.argv[2], kill)
"""


def test_killed_after_the_second_batch_it_ends_bit_for_bit_as_undisturbed(folder, tmp_path):
    here = Path(__file__).parent
    words = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), str(here), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), *sys.path])}
    assert subprocess.run(words, env=environment, timeout=120).returncode == -signal.SIGKILL
    parts = sorted(p.name for p in (tmp_path / "killed" / "it.parts").iterdir())
    assert parts == ["part_0000.parquet", "part_0001.parquet"]
    said = []
    resumed = run(folder, tmp_path / "killed", lambda drawn: said.append(drawn.samples), notes=said)
    # known before anything is drawn; two were there, one was drawn, and the greedy ones
    assert said == [f"resumed: 2 parts were in {tmp_path / 'killed' / 'it.parts'}", 0, 0, 8, 6]
    whole = run(folder, tmp_path / "whole")
    plain = run(folder, None)
    for other in (whole, plain):
        assert other.metrics == resumed.metrics
        pd.testing.assert_frame_equal(other.samples, resumed.samples, check_exact=True)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["it.parquet", "it_greedy.parquet"]


def test_finished_samples_are_graded_again_and_not_drawn_again(folder, tmp_path):
    first = run(folder, tmp_path)
    calls = []

    def other(prompts, completions, **columns):
        calls.append(len(completions))
        return [1.0] * len(completions)

    notes = []
    again = run(folder, tmp_path, nothing_is_drawn, grader=other, notes=notes)
    assert calls == [24, 6] and again.metrics["pass@1"] == 1.0 != first.metrics["pass@1"]
    assert all("reused" in note for note in notes) and len(notes) == 2
    pd.testing.assert_frame_equal(first.samples[DRAWN], again.samples[DRAWN], check_exact=True)
    assert pd.read_parquet(tmp_path / "it.parquet")["correct"].all()  # what a filter would read


@pytest.mark.parametrize(
    "change, what",
    [
        ({"seed": 1}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"batch_size": 4}, "batch_size"),
        ({"samples": 5}, "samples"),
        ({"rows": ROWS[:5]}, "prompts"),
    ],
    ids=str,
)
def test_other_samples_are_never_taken_for_these(folder, tmp_path, change, what):
    old = run(folder, tmp_path).samples
    notes = []
    new = run(folder, tmp_path, notes=notes, **change)
    assert f"drawn anew ({what} changed)" in notes[0]
    pd.testing.assert_frame_equal(new.samples, run(folder, None, **change).samples, check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "it.old-1.parquet"), old)


def test_another_model_in_the_folder_is_noticed(folder, tmp_path):
    ours = save_model(tmp_path / "model")
    notes = []
    run(ours, tmp_path / "out", notes=notes)
    assert not notes
    run(ours, tmp_path / "out", notes=notes)
    assert "reused" in notes[0]
    weights = next(ours.glob("*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    run(ours, tmp_path / "out", notes=notes)
    assert "(model changed)" in notes[2]


def test_parts_of_other_samples_are_deleted(folder, tmp_path):
    def stop(drawn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, stop, seed=1)
    assert (tmp_path / "it.parts" / "part_0000.parquet").is_file()
    notes = []
    run(folder, tmp_path, seed=2, notes=notes)
    assert "seed changed" in notes[0] and "1 old parts" in notes[0] and "deleted" in notes[0]
    assert not (tmp_path / "it.parts").exists()


def test_a_grader_that_fails_costs_no_samples(folder, tmp_path):
    def broken(prompts, completions, **columns):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(folder, tmp_path, grader=broken)
    drawn, notes = [], []
    run(folder, tmp_path, drawn.append, notes=notes)
    assert "resumed: 3 parts" in notes[0] and [d.samples for d in drawn] == [0, 0, 0, 6]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_broken_part_is_drawn_again_and_the_others_stay(tmp_path, content):
    store = Store(tmp_path / "it.parquet", {"a": 1})
    frame = pd.DataFrame({"problem": [0], "token_entropy": [[0.5, 0.25]]})
    store.keep(0, frame)
    assert store.part(0)["token_entropy"][0].tolist() == [0.5, 0.25] and store.part(1) is None
    store.keep(1, frame), store.keep(2, frame)
    store.parts.joinpath("part_0000.parquet").write_bytes(content)
    assert "resumed: 2 parts" in (said := store.prepare()) and "1 more are broken" in said
    assert [store.part(i) is not None for i in range(3)] == [False, True, True]


def test_a_broken_table_is_moved_aside(tmp_path):
    store = Store(tmp_path / "it.parquet", {"a": 1})
    store.path.write_bytes(b"PAR1 and no more")
    assert store.finished() is None and "drawn anew (the file is broken)" in store.prepare()
    assert (tmp_path / "it.old-1.parquet").is_file() and not store.path.exists()


def test_a_table_of_an_older_version_is_moved_aside(tmp_path):
    pd.DataFrame({"problem": [0]}).to_parquet(tmp_path / "it.parquet")
    store = Store(tmp_path / "it.parquet", {"a": 1})
    assert store.finished() is None
    assert "drawn anew (the version of entrl changed)" in store.prepare()
    assert (tmp_path / "it.old-1.parquet").is_file() and not (tmp_path / "it.parquet").exists()


def test_adapters_stand_for_their_base_model_as_well(tmp_path):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    base.mkdir(), adapters.mkdir()
    (base / "model.safetensors").write_bytes(b"1")
    (adapters / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    before = model_fact(str(adapters), None)
    (base / "model.safetensors").write_bytes(b"12")
    assert model_fact(str(adapters), None) != before
    assert model_fact("org/name", "abc") != model_fact("org/name", "abd")


def test_a_part_of_another_rank_that_did_not_arrive_is_no_smaller_table(folder, tmp_path, monkeypatch):
    """Two ranks on two machines whose run.dir is not the same folder: each finds its own parts only."""
    monkeypatch.setattr("rl.draw.world_size", lambda: 2)
    with pytest.raises(CheckpointError, match="lacks what another process drew .part 1.*all nodes share"):
        run(folder, tmp_path)
