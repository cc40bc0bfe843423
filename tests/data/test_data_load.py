import json
import logging
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from data.errors import DataError
from data.load import Source, boxed, plain_text, table
from data.prompts import PromptFormat

SHARED = Path(__file__).parents[3] / "shared" / "datasets"
BOTH = {"prompt": "prompt", "answer": "answer"}
AS_IS = PromptFormat("as_is")


def source(path, columns=None, **options):
    return Source(path=str(path), columns=columns or BOTH, **{"prompt": AS_IS, **options})


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) if not isinstance(row, str) else row for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path):
    rows = [{"question": f"q{i}", "meta": {"gold": f"work #### {i}"}, "level": i % 2} for i in range(6)]
    return write(tmp_path / "set.jsonl", rows)


def test_columns_style_answer_mark_and_the_two_parts_of_one_file(jsonl):
    found = source(
        jsonl,
        {"prompt": "question", "answer": "meta.gold"},
        prompt=PromptFormat("Solve: {prompt}"),
        answer_after="####",
        holdout=2,
    )
    assert table(found, "heldout").to_list() == [
        {"prompt": "Solve: q0", "answer": "0"},
        {"prompt": "Solve: q1", "answer": "1"},
    ]
    assert table(found, "train")["answer"][:] == ["2", "3", "4", "5"]
    assert table(found, "train", limit=1)["answer"][:] == ["2"]


def test_without_a_holdout_both_parts_are_all_rows_and_where_chooses(jsonl):
    found = source(jsonl, {"prompt": "question"}, where={"level": [1]})
    assert table(found, "train")["prompt"][:] == table(found, "heldout")["prompt"][:] == ["q1", "q3", "q5"]


def test_the_first_present_of_several_names_is_taken(jsonl):
    found = source(jsonl, {"prompt": ["problem", "question"], "answer": ["answer", "meta.gold"]})
    assert table(found, "train")[3] == {"prompt": "q3", "answer": "work #### 3"}


def test_a_folder_of_parquet_files_by_split_or_all_of_them(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        pd.DataFrame({"prompt": [name], "answer": ["1"]}).to_parquet(tmp_path / f"{name}.parquet")
    assert table(source(tmp_path), "train")["prompt"][:] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert table(source(tmp_path, holdout=1), "heldout")["prompt"][:] == ["test"]
    with pytest.raises(DataError, match="no file for the split 'dev', only test, train"):
        table(source(tmp_path, splits={"train": "train", "heldout": "dev"}), "train")


def test_every_missing_column_is_named_at_once_with_those_present(jsonl):
    with pytest.raises(DataError) as error:
        table(source(jsonl, {"prompt": ["problem", "ask"], "answer": "meta.truth"}), "train")
    assert str(error.value).endswith(
        "has no column 'problem' or 'ask' for 'prompt'; none 'meta.truth' for 'answer'. Present: question, meta.gold, level. "
        "Set data.columns.prompt, data.columns.answer to one of them."
    )


def test_lists_are_reached_by_number_and_numbers_become_text(tmp_path):
    rows = [{"prompt": "a", "answer": [204, 5]}, {"prompt": "b", "answer": [7.0]}]
    found = table(source(write(tmp_path / "x.jsonl", rows), {"prompt": "prompt", "answer": "answer.0"}), "train")
    assert found["answer"][:] == ["204", "7"]


def test_boxed_answers_and_repeated_problems(tmp_path):
    rows = [{"prompt": "a", "answer": r"so $\boxed{\frac{1}{2}}$."}] * 3 + [{"prompt": "b", "answer": "3"}]
    found = table(source(write(tmp_path / "x.jsonl", rows), answer_boxed=True, unique=True), "train")
    assert found["answer"][:] == [r"\frac{1}{2}", "3"]
    assert boxed(r"\boxed{1} then \boxed 7$") == "7" and boxed(r"\boxed{1") is None and boxed("7") is None


BAD = [
    {"prompt": "good", "answer": "1"},
    {"prompt": "x", "answer": None},
    {"prompt": "  ", "answer": "1"},
    {"prompt": 5, "answer": "1"},
    {"prompt": "x", "answer": {"a": 1}},
    {"prompt": "x" * 10_000_000, "answer": "1"},
    {"prompt": [], "answer": "1"},
    {"prompt": [{"role": "user"}], "answer": "1"},
    {"prompt": "x", "answer": " "},
    {"prompt": "x", "answer": True},
    {"prompt": "half \ud800", "answer": "1"},
    "[1, 2]",
    '{"prompt": ',
    {"prompt": "x"},
]
REASONS = [
    "rows 2, 14: answer is null",
    "row 3: prompt is empty",
    "row 4: prompt is a int, expected text or messages",
    "row 5: answer is a dict, expected text or a number",
    "row 6: prompt has 10,000,000 characters, more than data.max_prompt_chars=100,000",
    "row 7: prompt is an empty list",
    "row 8: prompt has a message that is no {role, content}",
    "row 9: answer is empty",
    "row 10: answer is a bool",
    "row 11: prompt holds a lone surrogate",
    "row 12: is a list, expected an object",
    "row 13: is no JSON",
    "row 15: is not valid UTF-8 (byte 0xff at 12)",
]


@pytest.fixture
def bad(tmp_path):
    path = write(tmp_path / "bad.jsonl", BAD)
    path.write_bytes(path.read_bytes() + b'\n{"prompt": "\xff", "answer": "1"}\n')
    return path


def test_bad_rows_are_an_error_that_names_each(bad):
    with pytest.raises(DataError) as error:
        table(source(bad), "train")
    message = str(error.value)
    assert "has 14 bad of 15 rows (counted from 1)" in message and message.endswith("data.on_bad_row=skip.")
    assert all(reason in message for reason in REASONS) and len(message) < 2000


def test_or_they_are_left_out_and_said(bad, caplog):
    with caplog.at_level(logging.WARNING, "entrl.data"):
        assert table(source(bad, on_bad_row="skip"), "train").to_list() == [BAD[0]]
    assert "14 bad of 15 rows" in caplog.text and all(reason in caplog.text for reason in REASONS)


def test_invalid_utf8_in_a_parquet_file_is_found_by_row(tmp_path):
    broken = pa.array([b"fine", b"br\xffken", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken, "answer": ["1", "2", "3"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"1 bad of 3 rows .*row 2: is not valid UTF-8 \(byte 0xff at 2\)"):
        table(source(tmp_path / "x.parquet"), "train")


def test_a_stream_gives_the_same_rows_again_and_again(jsonl, bad, caplog):
    found = source(jsonl, {"prompt": "question"}, holdout=2, streaming=True)
    stream = table(found, "train")
    assert isinstance(stream, IterableDataset)
    assert [row["prompt"] for row in stream] == [row["prompt"] for row in stream] == ["q2", "q3", "q4", "q5"]
    assert table(found, "heldout")["prompt"][:] == ["q0", "q1"]
    with caplog.at_level(logging.WARNING, "entrl.data"):
        assert len(list(table(source(bad, streaming=True, on_bad_row="skip"), "train"))) == 1
    assert all(reason.split(": ", 1)[1] in caplog.text for reason in REASONS)


def test_chats_become_text_for_a_tokenizer_without_a_template(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    data = table(source(write(tmp_path / "chat.jsonl", [{"prompt": messages, "answer": "2"}])), "train")
    assert data[0]["prompt"] == messages
    assert plain_text(data)[0] == {"prompt": "Be brief.\n1+1?\n", "answer": "2"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.jsonl", "", "empty"),
        ("blank.jsonl", "\n\n", "empty"),
        ("broken.jsonl", '{"prompt": ', "1 bad of 1 rows .*is no JSON"),
        ("broken.json", '{"prompt": ', "cannot be read"),
        ("object.json", '{"prompt": "a"}', "holds a dict. Expected a list of objects"),
        ("broken.parquet", "no parquet", "cannot be read"),
        ("table.csv", "a,b", r"holds .csv"),
        (None, None, "does not exist"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / (name or "nothing.parquet")
    if name:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        table(source(path), "train")


def test_nothing_left_and_options_that_make_no_sense(jsonl):
    columns = {"prompt": "question"}
    with pytest.raises(DataError, match="no row left for train .holdout=9"):
        table(source(jsonl, columns, holdout=9), "train")
    for options, message in (
        ({"on_bad_row": "drop"}, "Expected error or skip"),
        ({"columns": {"answer": "a"}}, "no 'prompt', only answer"),
        ({"holdout": 0}, "holds nothing out"),
    ):
        with pytest.raises(DataError, match=message):
            Source(**{"path": str(jsonl), "columns": columns, **options})


def test_a_hub_set_that_cannot_be_reached():
    with pytest.raises(DataError, match="could not be loaded from the hub"):
        table(source("entrl-tests/no-such-set"), "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real problem sets is not there")
def test_real_sets_in_verls_layout():
    columns = {"prompt": "prompt", "answer": "reward_model.ground_truth"}
    for name, count in {"gsm8k_test": 1319, "math500": 500, "aime24": 30, "amc23": 40}.items():
        data = table(source(SHARED / f"{name}.parquet", columns, unique=True), "train")
        assert len(data) == count and isinstance(data[0]["answer"], str) and data[0]["prompt"][-1]["role"] == "user"


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}\r\n{"prompt": "b", "answer": "2"}\r\n')
    assert table(source(path), "train").to_list() == [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
