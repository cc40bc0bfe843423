"""entrl passport: its numbers, and its page in a browser."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from command_line import entrl, fails
from rl import build
from rl.config import compose
from rl.paths import find_model
from rl.report.passport_page import card, write_passport
from rl.study.passport import forking_vocabulary, held_by_top, pass_curve, prompt_states, sampled_ranks

FEW = ["passport.problems=6", "eval.samples=4", "eval.ks=[1,4]", "eval.greedy=false", "passport.min_count=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passport")
    few = [word for word in FEW if not word.startswith("eval.ks")]  # a passport has every k
    options = ["--data", "countdown", *few, f"run.dir={folder}", "--out", str(folder / "p.html")]
    assert entrl("passport", "builtin:countdown", *options) == 0
    return folder


@pytest.fixture(scope="module")
def model():
    cfg = compose([])
    path = find_model("builtin:countdown")
    return build.language_model(path, cfg.model), build.tokenizer(path, cfg.model)


def test_the_numbers_are_those_of_the_samples(made):
    folder = made
    found = json.loads((folder / "p.json").read_text())
    samples = pd.read_parquet(folder / "eval_builtin_countdown" / "countdown_t1_n4.parquet")
    entropy = np.concatenate(samples["token_entropy"].tolist())
    assert found["tokens"] == len(entropy) == sum(found["entropy"]["histogram"]["counts"])
    assert found["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert found["pass_at_k"][0]["value"] == pytest.approx(samples["correct"].mean())
    assert [p["k"] for p in found["pass_at_k"]] == [1, 2, 3, 4]
    assert sum(found["ranks"].values()) == pytest.approx(1)
    assert found["geometry"]["states"] == 6 and 1 <= found["geometry"]["rankme"] <= 5
    top = found["forking"][0]
    where = np.concatenate(samples["token_ids"].tolist()) == top["id"]
    assert top["mean"] == pytest.approx(entropy[where].mean()) and top["count"] == where.sum()
    assert (folder / "p.md").read_text() == card(found)


def test_samples_are_shared_with_eval(made, capsys):
    assert entrl("eval", "builtin:countdown", "data=countdown", "eval.limit=6", *FEW[1:4], f"run.dir={made}") == 0
    assert "reused from" in capsys.readouterr().out


def test_ranks_are_those_of_the_logits(model):
    model, tokenizer = model
    prompts = [tokenizer(text)["input_ids"] for text in ("12 = 3, 4 ", "7 = 1, 2, 4 ")]
    completions = [[5, 9, 7], [8]]
    samples = pd.DataFrame({"problem": [1, 0], "token_ids": [np.array(c) for c in completions]})
    found = sampled_ranks(model, prompts, samples, 1.0, 8, tokenizer.pad_token_id)
    for problem, completion, rank in zip([1, 0], completions, found, strict=True):
        ids = torch.tensor([prompts[problem] + completion])
        logits = model(input_ids=ids).logits[0, len(prompts[problem]) - 1 : -1]
        own = logits.gather(-1, torch.tensor(completion)[:, None])
        assert rank.tolist() == (1 + (logits > own).sum(-1)).tolist()


def test_states_are_those_at_the_end_of_each_prompt(model):
    model, tokenizer = model
    prompts = [tokenizer(text)["input_ids"] for text in ("12 = 3, 4 ", "7 = 1, 2, 4 ")]
    together = prompt_states(model, prompts, 8, tokenizer.pad_token_id)
    for prompt, state in zip(prompts, together, strict=True):
        alone = model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        assert state == pytest.approx(alone.detach().numpy(), abs=1e-4)


def test_golden_numbers():
    assert held_by_top(np.array([4.0, 0, 0, 0, 1]))[[0, 20, 40, 100]] == pytest.approx([0, 0.8, 1, 1])
    assert held_by_top(np.ones(10))[[10, 50]] == pytest.approx([0.1, 0.5])
    assert [p["value"] for p in pass_curve([np.array([True, False]), np.array([False, False])])] == [0.25, 0.5]


def test_the_forking_vocabulary_leaves_rare_words_out(model):
    ids, entropy = np.array([5, 5, 6, 6, 7]), np.array([1.0, 2.0, 0.5, 0.1, 9.0])
    found = forking_vocabulary(ids, entropy, model[1], size=5, min_count=2)
    assert [(w["id"], w["mean"], w["count"]) for w in found] == [(5, 1.5, 2), (6, 0.3, 2)]
    assert len(forking_vocabulary(ids, entropy, model[1], size=1, min_count=1)) == 1


def test_the_page_in_a_browser(made, browser):
    shown = browser(made / "p.html")
    shown.wait("document.body.dataset.ready === 'charts'")
    assert shown.run("return document.querySelectorAll('.plot .main-svg').length") >= 5
    assert "pass@4" in shown.find(".key").text and shown.errors() == [] and shown.requests() == []


def test_a_token_is_text_whatever_is_in_it(made, browser, tmp_path):
    found = json.loads((made / "p.json").read_text())
    evil = "<script>window.broken=1</script>"
    found["model"], found["forking"][0]["token"] = evil, evil
    found["geometry"] |= {"rankme": None, "alpha": None}
    shown = browser(write_passport(tmp_path / "p.html", found))
    assert evil in shown.find("h1").text and shown.find(".words code").text == evil
    assert shown.run("return window.broken") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["passport.tokens=0"], "passport.tokens=0 does not work"),
        (["eval.samples=0"], "eval.samples=0 does not work"),
        (["eval.temperature=0", "eval.samples=1", "eval.ks=[1]"], "a passport is of samples"),
        (["eval.engine=lm_eval"], "another program"),
        (["--data", "nothing"], "nothing"),
        (["--data"], "--data needs a value"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(words, said, tmp_path, capsys):
    assert said in fails(capsys, "passport", "builtin:countdown", f"run.dir={tmp_path}", *words)
    assert list(tmp_path.iterdir()) == []


def test_no_word_often_enough_says_so(made, browser, tmp_path):
    found = json.loads((made / "p.json").read_text()) | {"forking": []}
    assert "No word was sampled often enough" in browser(write_passport(tmp_path / "p.html", found)).find("#main").text
