"""Command lines for other harnesses, and their results read back, with a stand-in for the harness."""

import json
import shlex
import sys

import pytest

from rl.cli import main
from rl.errors import ConfigError
from rl.harness import Job, command, read_results, run

# Writes what lm_eval 0.4.13 writes, where it does: <output_path>/<model>/results_<time>.json
FAKE = """
import json, os, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_path") + 1]) / "model"
folder.mkdir(parents=True, exist_ok=True)
(folder / "words.json").write_text(json.dumps(words))
value = float(os.environ.get("FAKE_VALUE", "0.25"))
results = {"alias": "gsm8k", "exact_match,strict-match": value, "exact_match_stderr,strict-match": 0.01, "sample_len": 8}
if "silent" not in words:
    (folder / f"results_2026-01-01T00-00-0{len(list(folder.glob('results*')))}.json").write_text(
        json.dumps({"results": {"gsm8k": results}, "configs": {}})
    )
sys.exit(3 if "broken" in words else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module lm_eval for this process to find and for the child to run."""
    modules = tmp_path / "modules"
    (modules / "lm_eval").mkdir(parents=True)
    (modules / "lm_eval" / "__init__.py").write_text("")
    (modules / "lm_eval" / "__main__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("PYTHONPATH", str(modules))


def pairs(text):
    return dict(pair.split("=") for pair in text.split(","))


def after(words, option):
    return words[words.index(option) + 1]


def test_a_hub_model_with_the_tasks_own_decoding(tmp_path):
    words = command("lm_eval", Job("org/name", ["gsm8k", "minerva_math"], tmp_path, dtype="bfloat16", revision="abc"))
    assert words[:4] == [sys.executable, "-m", "lm_eval", "--model"]
    assert pairs(after(words, "--model_args")) == {"pretrained": "org/name", "dtype": "bfloat16", "revision": "abc"}
    assert after(words, "--tasks") == "gsm8k,minerva_math" and after(words, "--output_path") == str(tmp_path)
    assert after(words, "--batch_size") == "auto" and "--log_samples" in words
    assert not {"--gen_kwargs", "--limit", "--seed"} & set(words)


def test_what_is_asked_for_is_handed_on(tmp_path):
    decoding = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 4096}
    job = Job(
        "org/name",
        ["gsm8k"],
        tmp_path,
        trust_remote_code=True,
        decoding=decoding,
        batch_size=8,
        limit=5,
        seed=7,
        words=["--num_fewshot", "8"],
    )
    words = command("lm_eval", job)
    given = {"temperature": "0.6", "top_p": "0.95", "max_gen_toks": "4096", "do_sample": "True"}
    assert pairs(after(words, "--gen_kwargs")) == given
    assert pairs(after(words, "--model_args"))["trust_remote_code"] == "True"
    assert [after(words, o) for o in ("--batch_size", "--limit", "--seed")] == ["8", "5", "7"]
    assert words[-2:] == ["--num_fewshot", "8"]
    greedy = command("lm_eval", Job("org/name", ["gsm8k"], tmp_path, decoding={"temperature": 0}))
    assert pairs(after(greedy, "--gen_kwargs")) == {"temperature": "0", "do_sample": "False"}


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_adapters_go_on_their_base_model(tmp_path, own_tokenizer):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if own_tokenizer:
        (tmp_path / "tokenizer_config.json").write_text("{}")
    given = pairs(after(command("lm_eval", Job(str(tmp_path), ["gsm8k"], tmp_path)), "--model_args"))
    own = {"tokenizer": str(tmp_path)} if own_tokenizer else {}
    assert given == {"pretrained": "org/base", "peft": str(tmp_path), "dtype": "auto", **own}
    with pytest.raises(ConfigError, match="holds adapters, which lighteval merges"):
        command("lighteval", Job(str(tmp_path), ["gsm8k|0"], tmp_path))


def test_lighteval(tmp_path):
    words = command("lighteval", Job("org/name", ["gsm8k|0", "math_500|0"], tmp_path, dtype="bfloat16", limit=4))
    assert words[1:4] == ["-m", "lighteval", "accelerate"]
    assert pairs(words[4]) == {"model_name": "org/name", "dtype": "bfloat16"} and words[5] == "gsm8k|0,math_500|0"
    assert after(words, "--output-dir") == str(tmp_path) and after(words, "--max-samples") == "4"
    for option in ({"decoding": {"top_p": 0.9}}, {"seed": 3}):
        with pytest.raises(ConfigError, match="do not reach it"):
            command("lighteval", Job("org/name", ["gsm8k|0"], tmp_path, **option))


def test_refuses(tmp_path):
    with pytest.raises(ConfigError, match="eval.engine=lm_eval needs tasks"):
        command("lm_eval", Job("org/name", [], tmp_path))
    with pytest.raises(ConfigError, match="neither , nor = may be in it"):
        command("lm_eval", Job("/runs/lr=1e-6", ["gsm8k"], tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"results": {"gsm8k": 3}}'])
def test_a_file_of_another_shape(tmp_path, text):
    path = tmp_path / "results_x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no results file"):
        read_results(path)


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed. Run pip install 'entrl\[eval\]'"):
        run("lm_eval", Job("org/name", ["gsm8k"], tmp_path))


def test_the_results_of_this_run_and_not_of_an_older_one(fake, tmp_path, monkeypatch):
    job = Job("org/name", ["gsm8k"], tmp_path / "out")
    first = run("lm_eval", job)
    assert first == {
        "gsm8k/exact_match,strict-match": 0.25,
        "gsm8k/exact_match_stderr,strict-match": 0.01,
        "gsm8k/sample_len": 8.0,
    }
    monkeypatch.setenv("FAKE_VALUE", "0.75")
    assert run("lm_eval", job)["gsm8k/exact_match,strict-match"] == 0.75
    with pytest.raises(ConfigError, match="wrote no results"):
        run("lm_eval", Job("org/name", ["gsm8k"], tmp_path / "out", words=["silent"]))


def test_a_harness_that_fails(fake, tmp_path):
    with pytest.raises(ConfigError, match="ended with exit code 3"):
        run("lm_eval", Job("org/name", ["gsm8k"], tmp_path, words=["broken"]))


def test_entrl_eval_runs_it(fake, tmp_path, capfd):
    words = ["eval", "builtin:countdown", "eval.engine=lm_eval", "eval.tasks=[gsm8k]", f"--out={tmp_path / 'out'}"]
    assert main([*words, "eval.temperature=0.6", "eval.engine_args=[--num_fewshot,8]", "eval.limit=3"]) == 0
    assert "gsm8k/exact_match,strict-match" in capfd.readouterr().out
    got = json.loads((tmp_path / "out" / "lm_eval" / "model" / "words.json").read_text())
    assert pairs(after(got, "--gen_kwargs")) == {"temperature": "0.6", "do_sample": "True"}  # and no other of ours
    assert after(got, "--limit") == "3" and got[-2:] == ["--num_fewshot", "8"]
    assert pairs(after(got, "--model_args"))["pretrained"].endswith("assets/countdown")
    written = json.loads((tmp_path / "out" / "lm_eval_gsm8k.json").read_text())
    assert written["gsm8k/exact_match,strict-match"] == 0.25


def test_a_dry_run_prints_the_command_and_runs_nothing(tmp_path, capsys):
    words = ["eval", "builtin:countdown", "eval.engine=lm_eval", "eval.tasks=[gsm8k]", f"--out={tmp_path / 'out'}"]
    assert main([*words, "dry_run=true"]) == 0
    said = shlex.split(capsys.readouterr().out)
    assert said[:3] == ["python", "-m", "lm_eval"] and after(said, "--tasks") == "gsm8k" and "--limit" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "verb, overrides, message",
    [
        ("eval", ["eval.engine=lm_evl"], "Did you mean lm_eval?"),
        ("eval", ["eval.tasks=[gsm8k]"], "are for eval.engine=lm_eval or lighteval"),
        ("eval", ["eval.engine=lm_eval"], "needs tasks"),
        ("train", ["eval.engine=lm_eval"], "eval.engine=lm_eval is for entrl eval"),
    ],
)
def test_the_engine_is_checked(capsys, tmp_path, verb, overrides, message):
    assert main([verb, *overrides, f"run.dir={tmp_path / 'runs'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()
