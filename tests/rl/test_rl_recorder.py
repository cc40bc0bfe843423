import pandas as pd
import pytest
import torch

from rl.contract import Signal
from rl.recorder import Recorder
from rl.testing import batch_from_logits


def observe(recorder, step=1, groups=(0, 0, 1, 1), rewards=None, masked=(), plugin=None):
    g = torch.Generator().manual_seed(0)
    rows, columns = len(groups), 5
    mask = torch.arange(columns) < torch.tensor([[2 + i % 3] for i in range(rows)])
    mask[list(masked)] = False
    tokens = batch_from_logits(
        torch.randn(rows, columns, 7, generator=g),
        torch.randint(7, (rows, columns), generator=g),
        mask,
        torch.randn(rows, generator=g),
        reward=torch.tensor(rewards or [float(i) for i in range(rows)]),
        group=torch.tensor(groups),
    )
    signal = Signal.start(tokens)
    recorder.observe(
        step,
        tokens,
        signal if plugin is None else plugin(tokens, signal),
        prompts=[f"p{group}" for group in groups],
        completions=[f"c{i}" for i in range(rows)],
        token_texts=[["t"] * int(m.sum()) for m in tokens.mask],
        rewards={"correct": tokens.reward.tolist()},
    )
    return tokens


def test_a_row_holds_what_the_loss_saw_of_each_trainable_token(tmp_path):
    recorder = Recorder(tmp_path, every=1, max_rows=9)
    tokens = observe(recorder, plugin=lambda t, s: s.scale(torch.full_like(t.logp, 0.5)).drop(t.rank > 3))
    frame = pd.read_parquet(tmp_path / "step_000001.parquet")
    assert frame["completion"].tolist() == ["c0", "c1", "c2", "c3"] and frame["reward/correct"].tolist() == [0, 1, 2, 3]
    for i, row in enumerate(frame.itertuples()):
        m = tokens.mask[i]
        assert row.token_ids.tolist() == tokens.ids[i][m].tolist()
        assert row.entropy == pytest.approx(tokens.entropy[i][m].numpy())
        assert row.logp == pytest.approx(tokens.logp[i][m].numpy())
        assert row.kept.tolist() == (tokens.rank[i][m] <= 3).tolist() and (row.weight == 0.5).all()
        assert row.advantage == pytest.approx(tokens.advantages[i, 0].item())
        assert row.shaped == pytest.approx(0.5 * row.advantage * row.kept)


def test_the_first_groups_are_kept_whatever_order_they_come_in(tmp_path):
    recorder = Recorder(tmp_path, every=1, max_rows=4)
    observe(recorder, groups=(2, 0, 1, 2))
    observe(recorder, groups=(1, 0, 2, 1))
    frame = pd.read_parquet(tmp_path / "step_000001.parquet")
    assert frame["group"].tolist() == [0, 0, 1, 1]


def test_a_new_step_is_a_new_file_and_a_rank_has_its_own(tmp_path):
    first, second = Recorder(tmp_path, every=1, max_rows=7), Recorder(tmp_path, every=1, max_rows=7)
    first.share(0, rows=4)
    second.share(1, rows=4)
    for step in (1, 2):
        observe(first, step)
    observe(second, 2)
    names = ["step_000001.parquet", "step_000002.parquet", "step_000002.rank1.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names  # and nothing half written
    assert [len(pd.read_parquet(tmp_path / name)) for name in names] == [4, 4, 3]


def test_a_rank_for_which_the_ones_before_leave_no_room_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path / "rollouts", every=1, max_rows=8)
    recorder.share(2, rows=4)
    observe(recorder)
    assert not (tmp_path / "rollouts").exists()


def test_a_completion_without_a_trainable_token_is_a_row_of_empty_lists(tmp_path):
    observe(Recorder(tmp_path, every=1, max_rows=9), masked=[0])
    row = pd.read_parquet(tmp_path / "step_000001.parquet").iloc[0]
    assert len(row["token_ids"]) == len(row["entropy"]) == len(row["kept"]) == 0


def test_due():
    assert [s for s in range(1, 11) if Recorder("x", every=5, max_rows=1).due(s)] == [1, 5, 10]
    assert not any(Recorder("x", every=0, max_rows=1).due(s) for s in range(10))


@pytest.mark.parametrize(
    "count, rewards", [(0, []), (1, [3]), (2, [3, 0]), (3, [3, 2, 0]), (4, [3, 2, 0, 1]), (9, [3, 2, 0, 1])]
)
def test_a_sample_is_the_best_and_the_worst_and_no_row_twice(tmp_path, count, rewards):
    recorder = Recorder(tmp_path, every=1, max_rows=9)
    observe(recorder)
    assert [row["reward"] for row in recorder.sample(count)] == rewards
