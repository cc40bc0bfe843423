import json
from pathlib import Path

import pandas as pd
import pytest

from data.errors import DataError
from data.load import plain_text, table

SHARED = Path(__file__).parents[3] / "shared" / "datasets"


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"question": f"q{i}", "meta": {"gold": f"work #### {i}"}} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_columns_template_answer_mark_and_slice(jsonl):
    data = table(
        str(jsonl),
        columns={"prompt": "question", "answer": "meta.gold"},
        template="Solve: {prompt}",
        answer_after="####",
        skip=1,
        limit=2,
    )
    assert data.to_list() == [{"prompt": "Solve: q1", "answer": "1"}, {"prompt": "Solve: q2", "answer": "2"}]


def test_parquet_and_a_folder_of_files(tmp_path):
    for i in range(2):
        pd.DataFrame({"prompt": [f"p{i}"], "answer": [str(i)]}).to_parquet(tmp_path / f"{i}.parquet")
    data = table(str(tmp_path), columns={"prompt": "prompt", "answer": "answer"})
    assert data["prompt"][:] == ["p0", "p1"]


def test_a_missing_column_names_it_and_those_present(jsonl):
    with pytest.raises(
        DataError, match=r"no column 'problem' for 'prompt'. Present: question, meta. Set data.columns.prompt"
    ):
        table(str(jsonl), columns={"prompt": "problem"})
    with pytest.raises(DataError, match=r"'meta.truth'.*Present: meta.gold"):
        table(str(jsonl), columns={"answer": "meta.truth"})


def test_chat_prompts_become_text(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path.write_text(json.dumps({"prompt": messages, "answer": "2"}))
    data = table(str(path), columns={"prompt": "prompt", "answer": "answer"}, template="ignored for chats {prompt}")
    assert data[0]["prompt"] == messages
    assert plain_text(data)[0] == {"prompt": "Be brief.\n1+1?\n", "answer": "2"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.jsonl", "", "empty"),
        ("broken.jsonl", '{"prompt": ', "cannot be read"),
        ("table.csv", "a,b", r"holds .csv"),
        (None, None, "does not exist"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / (name or "nothing.parquet")
    if name:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        table(str(path), columns={"prompt": "prompt"})


def test_nothing_left(jsonl):
    with pytest.raises(DataError, match="skip=9"):
        table(str(jsonl), columns={"prompt": "question"}, skip=9)


def test_a_hub_set_that_cannot_be_reached(monkeypatch):
    with pytest.raises(DataError, match="could not be loaded from the hub"):
        table("entrl-tests/no-such-set", columns={"prompt": "prompt"})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")
def test_real_sets_in_verls_layout():
    for name, count in {"gsm8k_test": 1319, "math500": 500}.items():
        data = table(
            str(SHARED / f"{name}.parquet"), columns={"prompt": "prompt", "answer": "reward_model.ground_truth"}
        )
        assert len(data) == count and isinstance(data[0]["answer"], str) and data[0]["prompt"][-1]["role"] == "user"
