"""The command line as a user meets it: whole runs, bad input, and what is left behind."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from rl.cli import main, parse
from rl.config import compose
from rl.errors import ConfigError
from rl.paths import configs_dir

SHARED = Path(__file__).parents[2] / "shared" / "datasets"
EXPERIMENTS = sorted((configs_dir() / "experiment").rglob("*.yaml"))
SMALL = [
    "debug=two_steps",
    "trainer.per_device_train_batch_size=16",
    "data.train.count=32",
    "data.heldout.count=6",
]


def entrl(*argv):
    return main(list(argv))


def train(tmp_path, *overrides, name="it"):
    return entrl("train", *SMALL, f"run.dir={tmp_path}", f"run.name={name}", *overrides)


def fails(capsys, *argv):
    """Run something that must end with exit code 2 and one sentence; give the sentence."""
    assert entrl(*argv) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("entrl: ") and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_help_is_quick_and_lists_examples_and_plugins():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "rl.cli", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # the figure in the docs is 0.1 s; this only catches an import of torch
    assert all(done.stdout.count(f"entrl {verb}") >= 2 for verb in ("train", "eval", "show"))
    assert all(name in done.stdout for name in ("fork_mask", "steer", "entropy_band", "rank_shaping", "paper/spine"))


def test_help_imports_nothing_heavy():
    code = "import sys, rl.cli; rl.cli.main(['--help']); print({'torch', 'hydra', 'transformers', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


def test_a_run_from_end_to_end(tmp_path, capsys):
    assert train(tmp_path, "plugin=[fork_mask,steer]", "trainer.max_steps=3") == 0
    said = capsys.readouterr().out
    folder = tmp_path / "it"
    assert {"config.yaml", "overrides.txt", "command.sh", "manifest.json", "metrics.jsonl", "summary.json", "DONE"} <= {
        p.name for p in folder.iterdir()
    }
    for part in (
        "step    3/3",
        "reward",
        "pass@1",
        "maj@2",
        "mean token entropy",
        "before",
        "after",
        str(folder),
        "entrl eval",
    ):
        assert part in said, part
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["plugins"] == ["fork_mask", "steer"] and summary["seed"] == 1
    assert set(summary["seconds"]) == {"warmstart", "train", "eval", "total"}
    for when in ("before", "after"):
        assert {"pass@1", "pass@2", "maj@2", "greedy", "entropy/mean", "entropy/top20_mean", "len"} <= set(
            summary["eval"][when]
        )
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["plugin/fork_mask/touched"] > 0.5 and "plugin/steer/touched" in line for line in lines)
    assert max(len(line) for line in lines) <= 60
    frame = pd.read_parquet(folder / "rollouts" / "step_000001.parquet")
    assert {"prompt", "completion", "reward", "advantage", "entropy", "logp", "kept", "weight"} <= set(frame.columns)

    # the run evaluates, and so does its checkpoint as a plain model
    capsys.readouterr()
    assert entrl("eval", str(folder), "eval.samples=2", "eval.ks=[1,2]", "eval.greedy=false") == 0
    said = capsys.readouterr().out
    assert "pass@2" in said and list((folder / "eval").glob("countdown_*.json"))
    assert "prompt    " in said and "answers   rewards.countdown.final_answers" in said
    final = str(folder / "checkpoints" / "final")
    small = ["eval.samples=2", "eval.ks=[1]", "data.heldout.count=4"]
    assert entrl("eval", final, *small, f"--out={tmp_path / 'out'}") == 0
    written = {"countdown_t1_n2.parquet", "countdown_t1_n2_greedy.parquet", "countdown_t1_n2.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written
    assert entrl("eval", "builtin:countdown", *small, f"run.dir={tmp_path}") == 0
    assert {p.name for p in (tmp_path / "eval_builtin_countdown").iterdir()} == written
    assert {p.name for p in (folder / "eval").glob("[ab]*")} >= {
        "before.parquet",
        "after.parquet",
        "after_greedy.parquet",
    }
    capsys.readouterr()
    assert entrl("eval", "builtin:countdown", *small, f"run.dir={tmp_path}") == 0
    assert "reused" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(tmp_path, f"seed={seed}", name=name) == 0
    a, b, c = (metrics(tmp_path / name) for name in "abc")
    assert a == b != c


def test_evaluation_before_training_does_not_change_the_training(tmp_path):
    for name, before in (("with", "true"), ("without", "false")):
        assert train(tmp_path, f"eval.before={before}", "eval.after=false", name=name) == 0
    drop = "entropy/above_reference_p80"  # known only when it was measured
    a, b = (
        [{k: v for k, v in line.items() if k != drop} for line in metrics(tmp_path / n)] for n in ("with", "without")
    )
    assert a == b


@pytest.mark.parametrize(
    "plugin", ["[]", "[fork_mask]", "[steer]", "[entropy_band]", "[rank_shaping]", "[rank_shaping,fork_mask,steer]"]
)
def test_methods_run_and_are_audited(tmp_path, plugin):
    assert train(tmp_path, f"plugin={plugin}", "eval.before=false", "eval.after=false") == 0
    last = metrics(tmp_path / "it")[-1]
    for name in plugin.strip("[]").split(","):
        assert not name or last[f"plugin/{name}/touched"] > 0


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_runs_two_steps_on_the_embedded_model(tmp_path, path):
    name = str(path.relative_to(configs_dir() / "experiment").with_suffix(""))
    assert train(tmp_path, f"experiment={name}", "scale=tiny", "eval.before=false") == 0
    assert len(metrics(tmp_path / "it")) == 2
    if path.stem == "spine":
        assert all(
            "reward/label_accuracy" in line and "reward/majority_ratio" in line for line in metrics(tmp_path / "it")
        )


def test_lora(tmp_path):
    assert train(tmp_path, "peft=lora", "plugin=[entropy_band]", "eval.before=false", "eval.after=false") == 0
    assert (tmp_path / "it" / "checkpoints" / "final" / "adapter_config.json").is_file()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")
@pytest.mark.parametrize(
    "data, file", [("parquet", "gsm8k_test"), ("gsm8k", "gsm8k_test"), ("dapo_math_17k", "DAPO-Math-17k")]
)
def test_real_problems_scored_by_math_verify(tmp_path, data, file):
    small = [o for o in SMALL if "count" not in o]
    assert (
        entrl(
            "train",
            *small,
            f"data={data}",
            f"data.path={SHARED / file}.parquet",
            "data.holdout=4",
            "data.strict_grader=null",
            "data.strict_answers=null",
            "trainer.max_completion_length=8",
            f"run.dir={tmp_path}",
            "run.name=it",
        )
        == 0
    )
    assert all("reward/correct" in line for line in metrics(tmp_path / "it"))


def test_dry_run_does_everything_but_the_training(tmp_path, capsys):
    assert train(tmp_path, "dry_run=true") == 0
    assert "2 prompts x 8 completions" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_show_and_cfg(capsys):
    assert entrl("show", "plugin.fork_mask.rho=0.5") == 0
    assert capsys.readouterr().out == "plugin.fork_mask.rho: 0.2 -> 0.5\n"
    assert entrl("train", "--cfg", "job", "seed=7") == 0
    assert "seed: 7" in capsys.readouterr().out
    assert entrl("show", "--full") == 0 and "rl.plugins.fork_mask.ForkMask" in capsys.readouterr().out
    assert entrl("--version") == 0


def test_arguments_in_any_order():
    parsed = parse(["eval", "eval.samples=2", "runs/x", "--config-dir", "mine", "~plugin.steer", "--out=o"])
    assert (parsed.target, parsed.config_dir, parsed.out) == ("runs/x", "mine", "o")
    assert parsed.overrides == ["eval.samples=2", "~plugin.steer"]
    for bad in (
        ["tran"],
        ["train", "word"],
        ["train", "--quick"],
        ["train", "--cfg", "hydra"],
        ["train", "--config-dir"],
    ):
        with pytest.raises(ConfigError):
            parse(bad)


BAD_REWARD = "def reward(prompts, completions, **columns):\n    return {}\n"


def rewards_of(tmp_path, monkeypatch, body, name):
    (tmp_path / f"{name}.py").write_text(BAD_REWARD.format(body))
    monkeypatch.syspath_prepend(tmp_path)
    return f"reward.correct.fn={{_target_: {name}.reward, _partial_: true}}"


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("r_nan", "[float('nan')] * len(prompts)", "reward.correct returned nan for sample 0 (prompt"),
        ("r_none", "[None] * len(prompts)", "reward.correct returned None for sample 0"),
        ("r_count", "[1.0]", "reward.correct returned 1 values for 8 completions"),
        (
            "r_raises",
            "[1 / 0 for _ in prompts]",
            "reward.correct raised ZeroDivisionError: division by zero on sample 0",
        ),
    ],
)
def test_a_broken_reward_is_found_before_anything_is_written(tmp_path, monkeypatch, capsys, name, body, message):
    override = rewards_of(tmp_path, monkeypatch, body, name)
    assert message in fails(capsys, "train", *SMALL, f"run.dir={tmp_path}/runs", override)
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_breaks_later_leaves_a_failed_run_that_says_why(tmp_path, monkeypatch, capsys):
    override = rewards_of(tmp_path, monkeypatch, "[float('nan') if c else 0.0 for c in completions]", "r_late")
    sentence = fails(capsys, "train", *SMALL, "eval.before=false", f"run.dir={tmp_path}/runs", "run.name=x", override)
    assert "reward.correct returned nan for sample" in sentence and "completion '" in sentence
    assert "RewardError" in (tmp_path / "runs" / "x" / "FAILED").read_text()
    assert not (tmp_path / "runs" / "x" / "DONE").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["plugin=[nothing]"], "plugin=nothing does not exist"),
        (["trainer.learnin_rate=1"], "Did you mean learning_rate?"),
        (
            ["plugin.fork_mask.rho=20"],
            "plugin.fork_mask.rho=20 is not a fraction. Expected 0 < rho <= 1; 0.2 keeps the top 20 %.",
        ),
        (["plugin.steer.w_min=0.5"], "plug-in steer is not selected"),
        (["trainer.per_device_train_batch_size=12"], "12 is not a multiple of 8"),
        (["trainer.loss_type=dpo"], "trainer.loss_type=dpo is not known. Expected one of: grpo, dapo"),
        (["trainer.epsilon=wide"], "trainer.epsilon=wide is a str"),
        (["data.levels=[9]"], "counts of numbers from 2 to 6"),
        (["data.train.count=0"], "at least 1"),
        (["model.path=/no/such/folder"], "/no/such/folder is no folder with a model"),
        (["model.path={tmp}"], "holds no model"),
        (["model.path=no-such-org/no-such-model"], "could not be loaded"),
        (["reward=[]"], "nothing to learn"),
        (["data=jsonl", "data.path=/no/such.jsonl"], "does not exist"),
        (["data.grader._target_=rewards.nothing.fn"], "rewards.nothing.fn cannot be made"),
        (["plugin.fork_mask._target_=rl.plugins.fork_mask.Nope"], "plugin.fork_mask"),
        (["eval.ks=[1,64]"], "eval.samples"),
        (["eval.top_p=1.5"], "eval.top_p=1.5 does not work. Expected 0 < top_p <= 1"),
        (["eval.temperature=0"], "would be the same completion 2 times"),
        (["eval.limit=0"], "eval.limit=0 does not work"),
        (["data.train.count=31"], "data.train has 31 problems, a rollout takes 32 (256 completions"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 does not work. Expected a number above 0."),
        (["trainer.temperature=0"], "trainer.temperature=0"),
        (["trainer.learning_rate=null"], "trainer.learning_rate=None"),
        (["plugin.fork_mask.rho=abc"], "plugin.fork_mask.rho=abc is not a fraction"),
        (["model.dtype=float99"], "model.dtype=float99 is not known"),
        (["run.name=a/b"], "run.name=a/b is no name of a folder"),
        (["run.dir=/proc/x"], "run.dir=/proc/x cannot be written"),
        (["data.answers=null"], "data.answers is not set"),
        (["logger.mode=foo"], "logger.mode=foo is not known"),
        (["rollout=foo"], "rollout=foo does not exist"),
        (["trainer.repetition_penalty=1.1"], "rollout=native does not know trainer.repetition_penalty"),
        (["trainer.use_vllm=true"], "contradict each other"),
        (["seed=-1"], "seed=-1 is no seed"),
        (["eval.seed=-1"], "eval.seed=-1 is no seed"),
        (["run.name=1234"], "run.name=1234 is no text"),
        (["run.name=.."], "run.name=.. is no name of a folder"),
        (["eval.ks=3"], "eval.ks=3 is no list of whole numbers"),
        (["eval.samples=two"], "eval.samples=two does not work"),
        (["eval.before=maybe"], "eval.before=maybe is neither true nor false"),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5 does not work. Expected a whole number."),
        (["trainer.top_p=2"], "trainer.top_p=2 does not work"),
        (["engine.threads=-1"], "engine.threads=-1 does not work"),
        (["data=jsonl", "data.path="], "is no path"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, capsys, overrides, message):
    overrides = [o.format(tmp=tmp_path) if "{tmp}" in o else o for o in overrides]
    assert message in fails(capsys, "train", *SMALL[:1], f"run.dir={tmp_path}/runs", *overrides)
    assert not (tmp_path / "runs").exists()


def test_missing_columns_and_empty_files(tmp_path, capsys):
    rows = tmp_path / "set.jsonl"
    rows.write_text('{"question": "1+1", "gold": "2"}\n')
    where = ["data=jsonl", f"data.path={rows}", f"run.dir={tmp_path}/runs"]
    sentence = fails(capsys, "train", *where)
    assert "none 'answer' for 'answer'. Present: question, gold." in sentence
    rows.write_text("")
    assert "is empty" in fails(capsys, "train", *where)
    assert not (tmp_path / "runs").exists()


def test_a_stream_with_the_default_filters_trains(tmp_path):
    rows = tmp_path / "set.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "1 2 {i} > 7 :", "answer": "7"}}' for i in range(40)))
    options = ["data=jsonl", f"data.path={rows}", "data.holdout=4", "data.streaming=true", "eval.before=false"]
    small = [o for o in SMALL if "count" not in o]
    assert entrl("train", *small, *options, "eval.after=false", f"run.dir={tmp_path}", "run.name=it") == 0
    assert len(metrics(tmp_path / "it")) == 2


def test_problems_without_labels_are_voted_on(tmp_path):
    rows = tmp_path / "set.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "1 2 {i} > 7 :"}}' for i in range(40)))
    options = ["data=jsonl", f"data.path={rows}", "data.holdout=4", "data.columns.answer=null", "eval.before=false"]
    options += ["reward=[majority_vote]", "reward.majority_vote.fn.grader=null", "eval.after=false"]
    small = [o for o in SMALL if "count" not in o]
    assert entrl("train", *small, *options, f"run.dir={tmp_path}", "run.name=it") == 0
    assert all("reward/majority_ratio" in line for line in metrics(tmp_path / "it"))


def test_an_existing_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "it").mkdir()
    sentence = fails(capsys, "train", *SMALL, f"run.dir={tmp_path}", "run.name=it")
    assert "exists already" in sentence and "run.overwrite=true" in sentence and not list((tmp_path / "it").iterdir())


def test_eval_of_what_is_no_model(tmp_path, capsys):
    assert "holds no model" in fails(capsys, "eval", str(tmp_path))
    assert "is no folder with a model" in fails(capsys, "eval", str(tmp_path / "x"))


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


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_sets_of_one_name_are_refused(tmp_path, capsys, verb):
    same = [word.replace("name: hard", "name: easy") for word in TWO]
    sentence = fails(capsys, verb, *same, "dry_run=true")
    assert "eval.sets.easy and eval.sets.hard are all named easy" in sentence and "eval.sets.hard.name=..." in sentence


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


def test_config_of_a_run_is_the_resolved_one(tmp_path):
    assert train(tmp_path, "plugin.fork_mask.rho=0.3", "eval.before=false", "eval.after=false") == 0
    import yaml

    written = yaml.safe_load((tmp_path / "it" / "config.yaml").read_text())
    assert written["plugin"]["fork_mask"]["rho"] == 0.3 and "${" not in (tmp_path / "it" / "config.yaml").read_text()
    assert compose().plugin.fork_mask.rho == 0.2


@pytest.mark.parametrize("rollout", ["vllm_colocate", "vllm_server"])
def test_without_vllm_its_rollouts_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch, rollout):
    monkeypatch.setattr("rl.build.find_spec", lambda name: None)
    assert "vLLM is not installed" in fails(capsys, "train", f"run.dir={tmp_path}/runs", f"rollout={rollout}")
