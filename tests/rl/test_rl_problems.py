"""Data sets as a run uses them, from the configuration."""

import json
from pathlib import Path

import pytest
from datasets import IterableDataset

from data.countdown import tokenizer
from data.errors import DataError
from rl.config import compose
from rl.errors import ConfigError
from rl.problems import problem_sets, problems

SHARED = Path(__file__).parents[3] / "shared" / "datasets"
TOKENIZER = tokenizer()
# set -> its file, training and held-out problems
REAL = {
    "gsm8k": ("gsm8k_test", 1119, 200),
    "dapo_math_17k": ("DAPO-Math-17k", 16693, 256),
    "math500": ("math500", 500, 500),
    "aime24": ("aime24", 30, 30),
    "aime25": ("aime25", 30, 30),
    "amc23": ("amc23", 40, 40),
    "minerva": ("minerva_math", 272, 272),
    "olympiadbench": ("olympiadbench", 675, 675),
}


@pytest.fixture
def files(tmp_path):
    """Two sets of eight problems of 20 words, the first two of which they share."""
    for name in "ab":
        rows = []
        for i in range(8):
            own = f"{'' if i < 2 else name}{i}"
            text = " ".join(f"word{own}x{j}" for j in range(20))
            rows.append({"prompt": f"{text} ?", "answer": str(i), "pass_rate": i / 8})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")
@pytest.mark.parametrize("name", REAL)
def test_every_configuration_reads_its_set_from_a_local_file_too(name):
    file, train, heldout = REAL[name]
    found = problems(compose([f"data={name}", f"data.path={SHARED / file}.parquet"]), TOKENIZER)
    assert (found.size, len(found.heldout)) == (train, heldout)
    assert all(isinstance(row["prompt"], str) and row["answer"] for row in found.heldout)
    if name != "dapo_math_17k" and name != "gsm8k":  # these are evaluated on themselves
        assert found.first(1)[0] == found.heldout[0]


def test_filters_count_what_they_drop(files):
    asked = [f"data.path={files}/a.jsonl", "data.holdout=1", "data.columns.pass_rate=pass_rate"]
    asked += ["data.filter.pass_rate={low: 0.3, high: 0.8}", "data.filter.decontaminate=[jsonl]"]
    asked += [f"data.filter.decontaminate.jsonl.path={files}/b.jsonl"]
    found = problems(compose(["data=jsonl", *asked]), TOKENIZER)
    assert [row["answer"] for row in found.first(9)] == ["3", "4", "5", "6"]
    assert found.dropped == {"with a pass rate outside 0.3 to 0.8": 3}
    assert found.describe() == (
        "jsonl, 4 training (left out: 3 with a pass rate outside 0.3 to 0.8) and 1 held-out problems"
    )
    without_rates = problems(compose(["data=jsonl", *(o for o in asked if "pass_rate" not in o)]), TOKENIZER)
    assert without_rates.dropped == {"in common with jsonl": 1} and without_rates.size == 6


def test_a_mixture_and_what_it_is_evaluated_on(files):
    sets = ["data=mixture", "data.sets=[jsonl,parquet]", "data.weights.parquet=3"]
    sets += [f"data.sets.jsonl.path={files}/a.jsonl", f"data.sets.parquet.path={files}/b.jsonl"]
    sets += ["data.sets.parquet.columns.answer=answer", "data.sets.jsonl.holdout=2", "data.sets.parquet.holdout=3"]
    cfg = compose(sets)
    found = problems(cfg, TOKENIZER)
    sources = found.train["source"][:]
    assert found.size == 11 and sources[:4].count("parquet") == 3 and not cfg.trainer.shuffle_dataset
    assert {name: len(s.heldout) for name, s in problem_sets(cfg, TOKENIZER).items()} == {"jsonl": 2, "parquet": 3}


def test_evaluation_sets_take_the_place_of_the_own_held_out_problems(files):
    cfg = compose(["eval.sets=[jsonl]", f"eval.sets.jsonl.path={files}/a.jsonl", "eval.sets.jsonl.holdout=5"])
    assert {name: len(s.heldout) for name, s in problem_sets(cfg, TOKENIZER).items()} == {"jsonl": 5}
    assert list(problem_sets(compose(), TOKENIZER)) == ["countdown"]


def test_a_stream_is_filtered_and_has_no_size(files):
    asked = [f"data.path={files}/a.jsonl", "data.holdout=1", "data.streaming=true", "data.filter.max_prompt_tokens=21"]
    found = problems(compose(["data=jsonl", *asked]), TOKENIZER)
    assert isinstance(found.train, IterableDataset) and found.size is None and len(found.first(99)) == 7
    assert "a stream of training" in found.describe()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data=mixture"], "data.sets is empty"),
        (["data.sets=[jsonl]", "data.sets.jsonl.path=x.jsonl"], "data.sets is for data=mixture, not data=countdown"),
        (["data=jsonl", "data.path={a}", "data.holdout=1", "data.filter.max_prompt_tokens=1"], "leaves none of 7 rows"),
        (
            ["data.filter.decontaminate=[jsonl]", "data.filter.decontaminate.jsonl.path={a}"],
            "data.filter lacks duplicates, max_prompt_tokens, ngram",
        ),
        (["data=jsonl", "data.path={a}", "data.prompt.style=chatt"], "data.prompt.style='chatt' is not known"),
        (["eval.sets=[jsonl2]"], "data=jsonl2 does not exist"),
        (["eval.sets=[mixture]"], "a mixture cannot be one of several sets"),
        (["data=jsonl", "data.path={a}", "data.holdout=1", "data.grader=null"], "data.grader is not set"),
    ],
    ids=str,
)
def test_what_is_refused(files, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message.replace("[", r"\[")):
        problems(compose([o.replace("{a}", f"{files}/a.jsonl") for o in overrides]), TOKENIZER)


def test_turns_of_phrase_are_those_of_the_whole_training_set(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.problems._SAMPLE", 3)  # of a stream
    phrase = " ".join(f"p{i}" for i in range(15))
    rows = [{"prompt": f"problem {i} {phrase}", "answer": "1"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": f"another {phrase}", "answer": "1"}))
    asked = [
        "data=jsonl",
        f"data.path={tmp_path}/train.jsonl",
        "data.holdout=null",
        "data.filter.decontaminate=[jsonl]",
    ]
    asked += [
        f"data.filter.decontaminate.jsonl.path={tmp_path}/other.jsonl",
        "data.filter.decontaminate.jsonl.holdout=null",
    ]
    assert problems(compose(asked), TOKENIZER).size == 9
