"""``entrl forks`` from the command line: whose completion, graded by what, written where, and what is refused."""

import json
import shutil

import pytest

from command_line import entrl, fails, train

TINY = ["forks.tokens=2", "forks.branches=3", "forks.samples=8", "data.heldout.count=6"]
MODEL = "builtin:countdown"


def numbers(path):
    return json.loads(path.read_text())


def test_a_run_gets_a_table_a_page_and_numbers(tmp_path, capsys):
    assert train(tmp_path, "eval.before=false", "eval.after=false", "trainer.max_completion_length=15") == 0
    capsys.readouterr()
    assert entrl("forks", str(tmp_path / "it"), *TINY[:3], "forks.problem=2") == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == str(tmp_path / "it" / "forks.html")
    found = numbers(tmp_path / "it" / "forks.json")
    assert found["problem"] == "problem 2 of countdown" and found["measure"] == "correct"
    assert found["decoding"]["max_new_tokens"] == 15  # the run's own
    assert len(found["forks"]) == 2 and f"[1] token {found['forks'][0]['place']}" in said
    b = found["forks"][0]["branches"][0]
    assert f"{b['prob']:.3f}" in said and f"{b['value']['value']:.2f} ({b['value']['low']:.2f} to" in said
    assert 0 < len(b["examples"]) <= 6 and "[1]" in said.split("completion  ")[1].splitlines()[0]


def test_a_model_is_written_beside_you_or_where_you_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entrl("forks", MODEL, *TINY) == 0
    assert numbers(tmp_path / "forks_builtin_countdown.json")["drawn"] == "sample"
    assert entrl("forks", MODEL, *TINY, "--out", "deep/other.html", "forks.completion=greedy") == 0
    other = numbers(tmp_path / "deep" / "other.json")
    assert other["drawn"] == "greedy" and all(f["rank"] == 1 for f in other["forks"])


def test_a_prompt_of_the_held_out_problems_is_graded_and_another_votes(tmp_path, capsys):
    out = tmp_path / "it.html"
    assert entrl("forks", MODEL, *TINY, "--out", str(out)) == 0
    first = numbers(out.with_suffix(".json"))
    assert entrl("forks", MODEL, *TINY, "--out", str(out), "--prompt", first["prompt"]) == 0
    same = numbers(out.with_suffix(".json"))
    assert same["problem"] == "problem 0 of countdown" and same["forks"] == first["forks"]
    assert entrl("forks", MODEL, *TINY, "--out", str(out), "--prompt", "1 2 3 > 6 :") == 0
    free = numbers(out.with_suffix(".json"))
    assert (
        free["measure"] == "majority" and free["majority"] == "6" and "it need not be right" in capsys.readouterr().out
    )


def test_a_given_answer_grades_a_prompt_without_any_data(tmp_path):
    out = tmp_path / "it.html"
    asked = ["--prompt", "1 2 3 > 6 :", "--out", str(out)]
    assert (
        entrl("forks", MODEL, *TINY, *asked, "forks.answer=6", "data.heldout.count=0") == 0
    )  # which is refused if looked at
    right = numbers(out.with_suffix(".json"))
    assert right["measure"] == "correct" and right["start"]["value"] > 0.5
    assert entrl("forks", MODEL, *TINY, *asked, "forks.answer=7") == 0
    assert numbers(out.with_suffix(".json"))["start"]["value"] < 0.5


def test_a_saved_model_does_not_get_the_lengths_of_the_embedded_one(tmp_path):
    from rl.paths import find_model
    from rl.study.forks import config_for

    shutil.copytree(find_model(MODEL), tmp_path / "it's mine")
    cfg = config_for(str(tmp_path / "it's mine"), [], None)
    assert cfg.eval.max_new_tokens == 2048 and cfg.model.name == "local"
    assert config_for(str(tmp_path / "it's mine"), ["model=qwen3_0.6b"], None).model.name != "local"
    assert config_for(MODEL, [], None).eval.max_new_tokens == 20


@pytest.mark.parametrize(
    "words, says",
    [
        (["forks.problem=6"], ["forks.problem=6 does not exist", "6 held-out problems: 0 to 5"]),
        (["forks.problem=-1"], ["forks.problem=-1 does not exist"]),
        (["forks.branches=44"], ["more than the 43 words"]),
        (["forks.completion=gredy"], ["forks.completion=gredy is not known", "Did you mean greedy?"]),
        (["eval.temperature=0"], ["eval.temperature=0 is greedy"]),
        (["forks.samples=x"], ["forks.samples=x does not work"]),
        (["forks.seed=-1"], ["forks.seed=-1 is no seed"]),
        (["forks.sampels=8"], ["Did you mean forks.samples?"]),
        (["forks.answer=3"], ["forks.answer is the answer to a --prompt"]),
        (["--prompt", "a", "--prompt", "b"], ["takes one --prompt, and got 2"]),
        (["--prompt", ""], ["The prompt has no tokens"]),
        (["eval.top_k=1"], ["one word at every place"]),
        (["forks.max_new_tokens=0"], ["or null"]),
        (["forks.grader=null", "forks.answer=6", "--prompt", "1 2 3 > 6 :"], ["forks.grader is not set"]),
        (["forks.answers._target_=no.such", "--prompt", "1 2 3 > 6 :"], ["forks.answers: no.such cannot be made"]),
        (["eval.engine=lm_eval"], ["eval.engine=lm_eval is another program"]),
        (["--out", "it.json"], ["--out it.json is no place for a page"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path, capsys, words, says):
    sentence = fails(capsys, "forks", MODEL, *TINY, "--out", str(tmp_path / "it.html"), *words)
    assert all(part in sentence for part in says), sentence
    assert not list(tmp_path.iterdir())


def test_a_wrong_model_is_refused(capsys, tmp_path):
    assert "is no folder with a model" in fails(capsys, "forks", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no model" in fails(capsys, "forks", str(tmp_path / "empty"))


def test_a_page_that_cannot_be_written_is_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("rl.study.forks.study", None)  # nothing is drawn before that is known
    out = ["--out", str(tmp_path / "file" / "a.html")]
    assert "cannot be written" in fails(capsys, "forks", MODEL, *TINY, *out)
    monkeypatch.setattr("rl.study.passport.evaluate_sets", None)
    assert "cannot be written" in fails(capsys, "passport", MODEL, *out)
    assert "no place for a page" in fails(capsys, "passport", MODEL, "--out", "card.md")
    monkeypatch.setattr("rl.study.draw_lens.lens_of_model", None)
    assert "cannot be written" in fails(capsys, "lens", MODEL, *out)
