"""``entrl lens``: of runs without torch, of models by drawing; every mistake ends with one sentence."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

from command_line import entrl, fails
from rl.draw import Decoding
from rl.report import lens as report_lens
from rl.scoring import score
from rl.study.draw_lens import drawn

FAST = ["eval.samples=2", "eval.limit=2", "eval.max_new_tokens=8", "engine.threads=1"]


@pytest.fixture
def run_folder(tmp_path):
    def make(name):
        folder = tmp_path / name
        (folder / "rollouts").mkdir(parents=True)
        (folder / "config.yaml").write_text("model: {name: tiny}\ndata: {name: countdown}\nrecord: {every: 20}\n")
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "seed": 1}))
        row = {"step": 20, "group": 0, "prompt": "1 2 > 3 :", "completion": "1 + 2", "reward": 1.0, "advantage": 0.5}
        row |= {
            "token_ids": [5, 6, 7],
            "tokens": ["1", "+", "2"],
            "entropy": [0.5, 0.0, 0.1],
            "logp": [-0.1, 0.0, -0.2],
        }
        pd.DataFrame([row]).to_parquet(folder / "rollouts" / "step_000020.parquet")
        return folder

    return make


@pytest.fixture
def sides(monkeypatch):
    """What was written to pages."""
    written = []
    write = report_lens.write_lens

    def kept(sides, out):
        written.extend(sides)
        return write(sides, out)

    monkeypatch.setattr("rl.study.lens.write_lens", kept)
    return written


def test_a_run_has_its_page_in_its_folder_without_torch(run_folder):
    folder = run_folder("a")
    code = (
        f"import sys, rl.cli; done = rl.cli.main(['lens', {str(folder)!r}]); "
        "print(done, {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == [str(folder / "lens.html"), "0 set()"]
    assert (folder / "lens.html").stat().st_size > 10_000


def test_two_runs_have_a_page_here_and_out_names_another(run_folder, tmp_path, monkeypatch, capsys):
    a, b = run_folder("a"), run_folder("b")
    monkeypatch.chdir(tmp_path)
    assert entrl("lens", str(a), str(b)) == 0 and (tmp_path / "lens_a_vs_b.html").is_file()
    assert entrl("lens", str(a), str(b), "--out", str(tmp_path / "x" / "y.html")) == 0
    assert (tmp_path / "x" / "y.html").is_file() and "y.html" in capsys.readouterr().out


def test_models_draw_the_first_held_out_problems_and_are_graded(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert entrl("lens", "builtin:countdown", "builtin:countdown", *FAST, "eval.temperature=0.7") == 0
    assert (tmp_path / "lens_builtin_countdown_vs_builtin_countdown.html").is_file()
    left, right = (side.views["samples"][0] for side in sides)
    assert len(left) == 4 and left["prompt"].nunique() == 2 and set(left["reward"]) <= {0.0, 1.0}
    pd.testing.assert_frame_equal(left, right)  # the same model, seed and problems


def test_prompts_are_drawn_as_they_are_given(sides, tmp_path):
    out = str(tmp_path / "p.html")
    prompts = ["--prompt", "1 2 3 4 > 10 :", "--prompt=2 2 2 2 > 8 :"]
    assert (
        entrl("lens", "builtin:countdown", *prompts, *FAST, "eval.temperature=0", "eval.samples=1", "--out", out) == 0
    )
    frame = sides[0].views["samples"][0]
    assert list(frame["prompt"]) == ["1 2 3 4 > 10 :", "2 2 2 2 > 8 :"] and frame["reward"].isna().all()
    assert all(ranks == [1] * len(ranks) for ranks in frame["rank"])  # greedy


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl.paths import find_model

    path = find_model("builtin:countdown")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_what_is_drawn_is_described_token_by_token(model):
    policy, tokenizer = model
    policy.train()
    state = torch.random.get_rng_state()
    decoding = Decoding(max_new_tokens=24, temperature=4.0, batch_size=4)
    frames = drawn(policy, tokenizer, ["1 2 3 4 > 10 :", "5 5 > 10 :"], decoding, samples=6, seed=7)
    assert policy.training and torch.equal(state, torch.random.get_rng_state())
    policy.eval()
    again = drawn(policy, tokenizer, ["1 2 3 4 > 10 :"], decoding, samples=6, seed=7)
    pd.testing.assert_frame_equal(frames[0], again[0])
    assert [len(frame) for frame in frames] == [6, 6]
    assert frames[0]["tokens"].map(len).nunique() > 1  # some end before the others of their batch
    for row in pd.concat(frames).itertuples():
        prompt = tokenizer(row.prompt)["input_ids"]
        ids = torch.tensor([prompt + row.token_ids])
        known = score(policy, ids, torch.ones_like(ids), len(row.token_ids), 4.0)
        assert row.logp == pytest.approx(known.logp[0].tolist(), abs=1e-4)
        assert row.entropy == pytest.approx(known.entropy[0].tolist(), abs=1e-4)
        assert tokenizer.eos_token_id not in row.token_ids[:-1]
        for token, rank, logp, ids, texts, probs in zip(
            row.token_ids, row.rank, row.logp, row.top_ids, row.top_tokens, row.top_probs, strict=True
        ):
            assert len(ids) == 5 and list(probs) == sorted(probs, reverse=True)
            assert (token == ids[0]) == (rank == 1) and texts == [tokenizer.decode([i]) for i in ids]
            if token in ids:
                assert probs[ids.index(token)] == pytest.approx(torch.tensor(logp).exp().item(), abs=1e-4)


def test_mistakes_end_with_a_sentence(run_folder, tmp_path, capsys):
    a = run_folder("a")
    assert "one or two" in fails(capsys, "lens", "x/a", "x/b", "x/c")
    assert "--prompt is empty" in fails(capsys, "lens", str(a), "--prompt", " ")
    assert "changes nothing in what a run recorded" in fails(capsys, "lens", str(a), "eval.samples=3")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, "lens", str(a), "--out", str(tmp_path / "file" / "x.html"))
    assert "no folder with a model" in fails(capsys, "lens", str(tmp_path / "nowhere"))
    assert "holds no model" in fails(capsys, "lens", str(a), "--prompt", "1 2 > 3 :")
    assert "eval.samples=0" in fails(capsys, "lens", "builtin:countdown", "eval.samples=0")
    assert "greedy" in fails(capsys, "lens", "builtin:countdown", "eval.temperature=0", "eval.samples=3")
    (a / "manifest.json").write_text('{"format": 99}')
    assert "format 99" in fails(capsys, "lens", str(a))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "is a sweep" in fails(capsys, "lens", str(tmp_path / "sweep"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path, model, capsys):
    model[0].save_pretrained(tmp_path / "bare")
    assert "tokenizer" in fails(capsys, "lens", str(tmp_path / "bare"), "--prompt", "1 2 > 3 :")
