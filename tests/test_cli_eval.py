"""Evaluations by the command line: whose data, which sets, which model."""

import json

import pandas as pd
import pytest

from command_line import entrl, fails, train

TWO = [
    "+eval.sets.easy={name: easy, heldout: {_target_: data.countdown.dataset, split: heldout, levels: [3], count: 5, seed: 0}}",
    "+eval.sets.hard={name: hard, heldout: {_target_: data.countdown.dataset, split: heldout, levels: [4], count: 6, seed: 0}}",
    *[
        f"+eval.sets.{name}.{key}={{_target_: rewards.countdown.{fn}, _partial_: true}}"
        for name in ("easy", "hard")
        for key, fn in (("grader", "solved"), ("answers", "final_answers"))
    ],
]


def test_several_sets_before_and_after_training_and_by_entrl_eval(tmp_path, capsys, monkeypatch):
    told = {}
    monkeypatch.setattr("rl.tracking.Tracker.finish", lambda self, summary: told.update(summary))
    assert train(tmp_path, *TWO, "eval.limit=5") == 0
    folder = tmp_path / "it"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["sets"]) == ["easy", "hard"] and summary["eval"] == summary["sets"]["easy"]
    for name, metrics in summary["sets"].items():
        assert set(metrics) == {"before", "after"}
        assert told[f"eval/{name}/pass@1"] == metrics["after"]["pass@1"]
        assert told[f"eval/{name}/before/pass@1"] == metrics["before"]["pass@1"]
        assert len(pd.read_parquet(folder / "eval" / f"after_{name}.parquet")) == 5 * 2
    capsys.readouterr()
    assert entrl("eval", str(folder), "eval.samples=2", "eval.ks=[1]") == 0  # the run's own sets, without its limit
    said = capsys.readouterr().out
    assert "easy, 5 problems" in said and "hard, 6 problems" in said
    assert {"easy_t1_n2.json", "hard_t1_n2.json"} <= {p.name for p in (folder / "eval").iterdir()}


def test_adapters_without_a_tokenizer_have_that_of_their_base_model(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rl.paths import find_model

    base = AutoModelForCausalLM.from_pretrained(find_model("builtin:countdown"))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "tokenizer_config.json").exists()
    small = ["eval.samples=2", "eval.ks=[1]", "data.heldout.count=4", f"--out={tmp_path / 'out'}"]
    assert entrl("eval", str(tmp_path / "adapters"), *small) == 0


def test_entrl_eval_takes_all_problems_unless_told(tmp_path, capsys):
    small = ["eval", "builtin:countdown", "data.heldout.count=205", "dry_run=true"]
    assert entrl(*small) == 0 and "countdown, 205 problems" in capsys.readouterr().out
    assert entrl(*small, "eval.limit=7") == 0 and "countdown, 7 problems" in capsys.readouterr().out
    assert train(tmp_path, "data.heldout.count=9", "eval.limit=4") == 0
    assert "4 held-out problems of countdown" in capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_data_and_length(tmp_path, capsys):
    assert train(tmp_path, "trainer.max_completion_length=5", "eval.before=false", "eval.after=false") == 0
    config = tmp_path / "it" / "config.yaml"
    config.write_text(config.read_text().replace("name: countdown", "name: mine"))
    capsys.readouterr()
    small = ["eval.samples=2", "eval.ks=[1]"]
    assert entrl("eval", str(tmp_path / "it"), *small) == 0
    assert "mine, 6 problems" in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "it" / "eval" / "mine_t1_n2.parquet")["tokens"].max() == 5
    sentence = fails(capsys, "eval", str(tmp_path / "it"), *small, "data.heldout.count=3")
    assert "was trained on mine" in sentence and "data=mine data.heldout.count=..." in sentence


def test_a_lora_run_is_evaluated(tmp_path, capsys):
    assert train(tmp_path, "peft=lora", "eval.before=false") == 0
    assert entrl("eval", str(tmp_path / "it"), "eval.samples=2", "eval.ks=[1]") == 0
    own = json.loads((tmp_path / "it" / "summary.json").read_text())["eval"]["after"]
    alone = json.loads((tmp_path / "it" / "eval" / "countdown_t1_n2.json").read_text())
    assert alone["pass@1"] == own["pass@1"] and alone["entropy/mean"] == pytest.approx(own["entropy/mean"], rel=1e-4)


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_sets_of_one_name_are_refused(tmp_path, capsys, verb):
    same = [word.replace("name: hard", "name: easy") for word in TWO]
    sentence = fails(capsys, verb, *same, "dry_run=true")
    assert "eval.sets.easy and eval.sets.hard are all named easy" in sentence and "eval.sets.hard.name=..." in sentence
