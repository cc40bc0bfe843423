"""The benchmarks run, and what they compare is the same thing; their timings are nobody's business here."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def scripts_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


@pytest.mark.parametrize("which", ["full", "mask20", "known", "hint", "full_hint"])
def test_head_cases_run(which):
    import bench_head

    for dtype in ("fp32", "bf16"):
        row = bench_head.case("entrl", dtype, which, {"tokens": 20, "width": 8, "vocab": 50}, threads=1)
        assert set(row) == {"cpu_s", "wall_s", "peak_mb", "work_mb"} and row["cpu_s"] > 0
    if which != "full_hint":
        bench_head.case("floor", "fp32", which, {"tokens": 20, "width": 8, "vocab": 50}, threads=1)


def test_head_peers_compute_the_same_numbers():
    import bench_head
    import torch

    hidden, weight, targets, upstream, kept = bench_head.tensors("fp32", 20, 8, 50)
    found = []
    for peer in ("entrl", "trl", "naive"):
        logp = bench_head.PEERS[peer]()(hidden, weight, targets, None)
        found.append(torch.autograd.grad((logp * upstream * kept).sum(), (hidden, weight)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


def test_a_whole_step_has_the_gradient_of_stock_trl(tmp_path):
    """Ragged lengths, groups without spread, the mask known beforehand and in the pass: at most 1e-5 apart."""
    import bench_step

    shape = {**bench_step.QUICK, "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 2}
    files = {kind: str(tmp_path / kind.replace(" ", "_")) for kind in ("trl", "entrl", "in the pass")}
    for kind, file in files.items():
        row = bench_step.step(kind, shape, "fp32", 1, file)
        assert row["cpu_s"] > 0
    assert bench_step.largest_difference(files["entrl"], files["trl"]) < 1e-5
    assert bench_step.largest_difference(files["in the pass"], files["trl"]) < 1e-5


def test_rollouts_are_the_ones_described():
    import bench_step

    batch = bench_step.rollouts()
    lengths = batch["completion_mask"].sum(-1).double()
    assert 0.25 < lengths.mean() / bench_step.LONGEST < 0.4 and lengths.std() > 0.3 * lengths.mean()
    groups = batch["advantages"].view(bench_step.GROUPS, bench_step.GROUP)
    assert (groups == 0).all(1).double().mean() == 0.4


def test_the_report_is_a_file_of_rows_and_ratios(tmp_path, capsys):
    from bench_common import report

    report("title", {"a": {"cpu_s": 1.0}, "b": {"cpu_s": 2.0, "x": 3e-6}}, {"time": 2.0}, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {
        "rows": [{"case": "a", "cpu_s": 1.0}, {"case": "b", "cpu_s": 2.0, "x": 3e-6}],
        "ratios": {"time": 2.0},
    }
    assert "time" in capsys.readouterr().out and not (tmp_path / "out.json.partial").exists()


def test_the_time_of_the_run_it_is_calibrated_on_is_predicted_exactly():
    import bench_ranks

    hardware = bench_ranks.calibrated(step_s=20.0, rollout_s=12.0)
    chosen = bench_ranks.cases(quick=False, offload=True)
    found = {name: bench_ranks.predicted(*one, hardware) for name, one in chosen.items()}
    assert found["19 M, single"] == pytest.approx((20.0, 12.0))
    assert found["41 M, single"] > found["19 M, single"] and found["19 M, 192 tokens, single"] > found["19 M, single"]
    parts = {name: bench_ranks.estimated(*one) for name, one in chosen.items()}
    for held in parts.values():
        bare = held.pop("without allocator")
        assert held.pop("estimate") > bare == pytest.approx(sum(held.values()))
