import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from rl.contract import Signal
from rl.recorder import Recorder, Told, write_rows
from rl.recording import look_row, padded, token_row
from rl.testing import batch_from_logits


def texts(ids):
    return [f"<{i}>" for i in ids]


def add(recorder, step=1, groups=(0, 0, 1, 1)):
    for i, group in enumerate(groups):
        row = {"step": step, "group": group, "completion": f"c{i}", "reward": float(i), "logp": [-0.5]}
        recorder.add(step, row, Told([group], [i], [True]))


def test_a_row_holds_what_the_loss_saw_of_each_trainable_token():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[2], [3], [0]])
    logits, old = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    ids, advantages = torch.randint(7, (3, 5), generator=g), torch.randn(3, generator=g)
    tokens = batch_from_logits(logits, ids, mask, advantages, old_logits=old)
    signal = Signal.start(tokens).scale(torch.full_like(tokens.logp, 0.5)).drop(tokens.rank > 3)
    for i in range(3):
        m, row = mask[i], token_row(tokens, signal, i, texts)
        assert row["token_ids"] == ids[i][m].tolist() and row["tokens"] == texts(row["token_ids"])
        assert row["entropy"] == pytest.approx(tokens.entropy[i][m].tolist())
        assert row["logp"] == pytest.approx(
            logits[i].log_softmax(-1).gather(-1, ids[i, :, None]).squeeze(-1)[m].tolist()
        )
        assert row["old_logp"] == pytest.approx(
            old[i].log_softmax(-1).gather(-1, ids[i, :, None]).squeeze(-1)[m].tolist()
        )
        assert row["kept"] == (tokens.rank[i][m] <= 3).tolist() and set(row["weight"]) <= {0.5}
        assert row["advantage"] == pytest.approx(advantages[i].item())
        assert row["shaped"] == pytest.approx([0.5 * row["advantage"] * kept for kept in row["kept"]])


def test_a_look_is_told_of_the_trainable_tokens_only():
    look = {
        "rank": torch.tensor([1, 2, 3]),
        "top_ids": torch.tensor([[4, 5], [6, 7], [8, 9]]),
        "top_logp": torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 0.0]]).log(),
    }
    row = look_row(look, torch.tensor([True, False, True]), texts)
    assert row["rank"] == [1, 3] and row["top_ids"] == [[4, 5], [8, 9]]
    assert row["top_tokens"] == [["<4>", "<5>"], ["<8>", "<9>"]] and row["top_probs"] == [[0.5, 0.25], [1.0, 0.0]]
    assert set(look_row({"rank": look["rank"]}, torch.tensor([True] * 3), texts)) == {"rank"}


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    ids, attention, trainable = padded([Told([5], [6, 7], [True, False]), Told([8, 9], [], [])], pad=0)
    assert ids.tolist() == [[0, 5, 6, 7], [8, 9, 0, 0]] and attention.tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert trainable.tolist() == [[True, False], [False, False]]
    assert padded([Told([5], [], [])], pad=0)[2].tolist() == [[False]]  # a model wants a place to look at


def test_the_first_groups_are_kept_whatever_order_they_come_in(tmp_path):
    recorder = Recorder(tmp_path, every=1, max_rows=4)
    add(recorder, groups=(2, 0, 1, 2))
    add(recorder, groups=(1, 0, 2, 1))
    told = recorder.told(1)
    assert [each.prompt for each in told] == [[0], [0], [1], [1]]
    recorder.note("logp_after", [[float(each.completion[0])] for each in told])
    recorder.write(1)
    frame = pd.read_parquet(tmp_path / "step_000001.parquet")
    assert frame["group"].tolist() == [0, 0, 1, 1] and [c for (c,) in frame["logp_after"]] == [1, 1, 0, 2]
    assert frame["completion"].tolist() == ["c1", "c1", "c0", "c2"]


def test_a_new_step_is_a_new_file_and_a_rank_has_its_own(tmp_path):
    first, second = Recorder(tmp_path, every=1, max_rows=7), Recorder(tmp_path, every=1, max_rows=7)
    first.share(0, rows=4)
    second.share(1, rows=4)
    for recorder, steps in ((first, (1, 2)), (second, (2,))):
        for step in steps:
            add(recorder, step)
            recorder.write(step)
    names = ["step_000001.parquet", "step_000002.parquet", "step_000002.rank1.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names  # and nothing half written
    assert [len(pd.read_parquet(tmp_path / name)) for name in names] == [4, 4, 3]
    first.write(3)  # nothing was observed of it
    assert not (tmp_path / "step_000003.parquet").exists()


def test_a_rank_for_which_the_ones_before_leave_no_room_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path / "rollouts", every=1, max_rows=8)
    recorder.share(2, rows=4)
    add(recorder)
    recorder.write(1)
    assert not (tmp_path / "rollouts").exists()


def test_columns_have_their_types_also_where_nothing_is_in_them(tmp_path):
    write_rows(tmp_path / "a.parquet", [{"reward": 1.0, "rank": [], "top_ids": []}, {"reward": 2.0, "logp": [-1.0]}])
    schema = pq.read_schema(tmp_path / "a.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "reward": "double",
        "rank": "list<element: int32>",
        "top_ids": "list<element: list<element: int32>>",
        "logp": "list<element: float>",
    }
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert len(frame["rank"][0]) == 0 and frame["rank"][1] is None and frame["logp"][0] is None


def test_due():
    assert [s for s in range(1, 11) if Recorder("x", every=5, max_rows=1).due(s)] == [1, 5, 10]
    assert not any(Recorder("x", every=0, max_rows=1).due(s) for s in range(10))


@pytest.mark.parametrize(
    "count, rewards", [(0, []), (1, [3]), (2, [3, 0]), (3, [3, 2, 0]), (4, [3, 2, 0, 1]), (9, [3, 2, 0, 1])]
)
def test_a_sample_is_the_best_and_the_worst_and_no_row_twice(tmp_path, count, rewards):
    recorder = Recorder(tmp_path, every=1, max_rows=9)
    add(recorder)
    assert [row["reward"] for row in recorder.sample(count)] == rewards
