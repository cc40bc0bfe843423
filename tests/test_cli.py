"""The command line as a user meets it: whole runs and what is left behind."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from command_line import SMALL, entrl, fails, metrics, train
from rl.arguments import parse
from rl.config import compose
from rl.errors import ConfigError
from rl.paths import configs_dir

SHARED = Path(__file__).parents[2] / "shared" / "datasets"
EXPERIMENTS = sorted((configs_dir() / "experiment").rglob("*.yaml"))


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
    "plugin",
    [
        "[]",
        "[fork_mask]",
        "[steer]",
        "[entropy_band]",
        "[rank_shaping]",
        "[rank_shaping,fork_mask,steer]",
        "[target_entropy]",
    ],
)
def test_methods_run_and_are_audited(tmp_path, plugin):
    # a target that two steps do not reach: above it there is nothing to do
    target = ["plugin.target_entropy.target=5"] if "target_entropy" in plugin else []
    assert train(tmp_path, f"plugin={plugin}", *target, "eval.before=false", "eval.after=false") == 0
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
    assert (parsed.target, parsed.config_dir, parsed.flags["--out"]) == ("runs/x", "mine", "o")
    assert parsed.overrides == ["eval.samples=2", "~plugin.steer"]
    for bad in (
        ["tran"],
        ["train", "word"],
        ["train", "--quick"],
        ["train", "--cfg", "hydra"],
        ["train", "--config-dir"],
        ["train", "--rollouts=3"],
        ["resume"],
        ["resume", "runs/x", "runs/y"],
        ["slurm"],
        ["slurm", "run"],
        ["sweep", "status"],
        ["sweep", "runs/x"],
        ["sync"],
        ["rewards"],
    ):
        with pytest.raises(ConfigError):
            parse(bad)


def test_one_target_too_many_is_named():
    with pytest.raises(
        ConfigError, match="entrl report takes one target, a run folder, as runs/NAME, and got 'runs/b' too"
    ):
        parse(["report", "runs/a", "runs/b"])


def test_words_behind_a_verb():
    assert parse(["sweep", "seed=1,2"]).word is None
    asked = parse(["sweep", "retry", "runs/x", "launcher.at_once=2"])
    assert (asked.word, asked.target, asked.overrides) == ("retry", "runs/x", ["launcher.at_once=2"])
    assert parse(["sync", "runs/a", "runs/b"]).targets == ["runs/a", "runs/b"]
    assert parse(["slurm", "submit", "--dry-run"]).flags == {"--dry-run": True}


def test_a_sweep_without_choices_is_no_sweep(capsys):
    assert "needs choices, as seed=1,2,3" in fails(capsys, "sweep")


def test_a_stream_with_the_default_filters_trains(tmp_path):
    rows = tmp_path / "set.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "1 2 {i} > 7 :", "answer": "7"}}' for i in range(40)))
    options = ["data=jsonl", f"data.path={rows}", "data.holdout=4", "data.streaming=true", "eval.before=false"]
    small = [o for o in SMALL if "count" not in o]
    assert entrl("train", *small, *options, "eval.after=false", f"run.dir={tmp_path}", "run.name=it") == 0
    assert len(metrics(tmp_path / "it")) == 2


def test_a_stream_that_is_shorter_than_a_rollout_is_a_failed_run(tmp_path, capsys):
    rows = tmp_path / "set.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "1 2 {i} > 7 :", "answer": "7"}}' for i in range(5)))
    options = ["data=jsonl", f"data.path={rows}", "data.holdout=4", "data.streaming=true", "eval.before=false"]
    small = [o for o in SMALL if "count" not in o]
    assert "ended after 0 of 2 steps" in fails(capsys, "train", *small, *options, f"run.dir={tmp_path}", "run.name=it")
    assert "ended after 0" in (tmp_path / "it" / "FAILED").read_text()


def test_problems_without_labels_are_voted_on(tmp_path):
    rows = tmp_path / "set.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "1 2 {i} > 7 :"}}' for i in range(40)))
    options = ["data=jsonl", f"data.path={rows}", "data.holdout=4", "data.columns.answer=null", "eval.before=false"]
    options += ["reward=[majority_vote]", "reward.majority_vote.fn.grader=null", "eval.after=false"]
    small = [o for o in SMALL if "count" not in o]
    assert entrl("train", *small, *options, f"run.dir={tmp_path}", "run.name=it") == 0
    assert all("reward/majority_ratio" in line for line in metrics(tmp_path / "it"))


def test_config_of_a_run_is_the_resolved_one(tmp_path):
    assert train(tmp_path, "plugin.fork_mask.rho=0.3", "eval.before=false", "eval.after=false") == 0
    import yaml

    written = yaml.safe_load((tmp_path / "it" / "config.yaml").read_text())
    assert written["plugin"]["fork_mask"]["rho"] == 0.3 and "${" not in (tmp_path / "it" / "config.yaml").read_text()
    assert compose().plugin.fork_mask.rho == 0.2
