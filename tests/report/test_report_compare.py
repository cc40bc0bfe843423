"""entrl compare, from folders to tables and files."""

import csv
import json
import re

import pytest
from rich.console import Console

from rl.cli import main
from rl.errors import ReportError
from rl.report.compare import as_csv, show_comparison
from rl.report.compare_terminal import WIDEST, show
from rl.report.compared import compare, letter
from rl.report.gather import gather
from rl.report.reading import read_run
from synthetic import write_run

FORK = {"fork_mask": {"_target_": "rl.plugins.fork_mask.ForkMask", "rho": 0.2}}
BETTER = (0.75,) * 12 + (0.25,) * 4


@pytest.fixture
def runs(tmp_path):
    """Two methods of three seeds, of which the second solves more problems."""
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs" / f"plain_s{seed}", seed=seed, rates=(0.5,) * (12 + seed) + (0.25,) * (4 - seed))
        write_run(tmp_path / "runs" / f"with_s{seed}", seed=seed, plugin=FORK, rates=BETTER)
    return tmp_path / "runs"


def read(*folders):
    return [read_run(folder) for folder in folders]


def test_a_comparison_is_printed_and_written(runs, tmp_path, capsys):
    out = {kind: tmp_path / "out" / f"it.{kind}" for kind in ("html", "csv", "json")}
    flags = [f"--{kind}={path}" for kind, path in out.items()]
    assert main(["compare", str(runs), *flags]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= max(WIDEST, *(len(str(path)) for path in out.values()))
    assert re.search(r"^A +plugin=none +3 +3 +1, 2, 3", shown, re.MULTILINE)
    assert "fewer than 5 seeds" in shown
    found = json.loads(out["json"].read_text())
    assert [m["label"] for m in found["methods"]] == ["plugin=none", "plugin=fork_mask"]
    assert found["methods"][1]["measures"]["pass@1"] == pytest.approx(
        {"value": 0.625, "low": 0.625, "high": 0.625, "runs": 3, "over": "seeds"}
    )
    (pair,) = found["pairs"]
    assert pair["problems"] == 16 and pair["difference"]["value"] == pytest.approx(0.625 - 0.46875)
    assert pair["test"]["p"] == pair["holm"] < 0.05 and pair["seeds_test"] is None
    assert pair["improvement"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["methods"][1]["pass_at"]["1"] == pytest.approx(0.625)
    rows = list(csv.DictReader(out["csv"].open()))
    assert len(rows) == 6 and {r["plugin"] for r in rows} == {"none", "fork_mask"}
    assert float(rows[0]["pass@1"]) == pytest.approx((13 * 0.5 + 3 * 0.25) / 16)
    assert out["html"].stat().st_size < 5e6


def test_the_order_of_the_runs_changes_the_order_of_the_rows_only(runs):
    folders = sorted(runs.iterdir())
    forth, back = compare(read(*folders)), compare(read(*folders[::-1]))
    assert [r.method.label for r in forth.results] == [r.method.label for r in back.results][::-1]
    assert [r.cells for r in forth.results] == [r.cells for r in back.results][::-1]
    assert sorted(as_csv(forth).splitlines()) == sorted(as_csv(back).splitlines())
    (one,), (other,) = forth.pairs, back.pairs
    assert one.difference.value == pytest.approx(-other.difference.value) and one.test.p == other.test.p


def test_five_shared_seeds_are_tested_over_seeds(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path / f"a{seed}", seed=seed, rates=(0.5,) * (8 + seed) + (0.25,) * (8 - seed))
        write_run(tmp_path / f"b{seed}", seed=seed, plugin=FORK, rates=(0.75,) * (8 + seed) + (0.25,) * (8 - seed))
    (pair,) = compare(gather([str(tmp_path)])[0]).pairs
    assert pair.seeds == [1, 2, 3, 4, 5]
    assert pair.seeds_test.p == pair.seeds_test.smallest == pair.seeds_holm == 2 / 32


def test_one_run_of_a_method_has_the_interval_over_problems_and_says_so(tmp_path, capsys):
    write_run(tmp_path / "alone")
    show_comparison([str(tmp_path / "alone")], {}, wandb=False)
    shown = capsys.readouterr().out
    assert re.search(r"pass@1 +0\.500 \[0\.400, 0\.600\]p", shown)
    assert re.search(r"reward +0\.\d+ *$", shown, re.MULTILINE) and "A: one run" in shown


def test_runs_that_did_not_finish_are_shown_and_left_out(runs, capsys):
    write_run(runs / "plain_s4", seed=4, state="FAILED", steps=5)
    write_run(runs / "plain_s5", seed=5, state="", steps=5)
    show_comparison([str(runs)], {}, wandb=False)
    shown = capsys.readouterr().out
    assert re.search(r"plugin=none +5 +3 ", shown) and "not finished: 1 failed, 1 open" in shown


def test_runs_that_an_alarm_stopped_are_counted(runs):
    summary = json.loads((runs / "plain_s2" / "summary.json").read_text()) | {"stopped_by": "length"}
    (runs / "plain_s2" / "summary.json").write_text(json.dumps(summary))
    notes = compare(read(*(runs / f"plain_s{seed}" for seed in (1, 2, 3)))).notes
    assert "A: 1 of 3 runs ended early, by an alarm." in notes


def test_where_nothing_finished_the_numbers_are_of_what_there_is(tmp_path):
    write_run(tmp_path / "a", state="STOPPED", steps=9)
    found = compare(read(tmp_path / "a"))
    assert found.results[0].cells["reward"].runs == 1 and not found.results[0].finished
    assert any("no run has finished" in note for note in found.notes)


def test_a_sweep_a_folder_of_sweeps_and_a_run_named_twice(runs, tmp_path, capsys):
    (runs / "sweep.json").write_text("{}")
    (runs / "sweep.jsonl").write_text("{}\n" * 8)
    write_run(runs / "plain_s1.old-1")
    found, notes = gather([str(tmp_path), str(runs / "plain_s1")])
    assert len(found) == 6
    assert any("1 of its runs was named before" in note for note in notes)
    assert any("moved aside" in note for note in notes)
    assert any("2 of its 8 points have no run folder yet" in note for note in gather([str(runs)])[1])


def test_a_run_read_from_its_folder_and_from_wandb_is_one(tmp_path, monkeypatch):
    import sys
    import types
    from dataclasses import replace

    from rl.wandb_run import Record

    folder = write_run(tmp_path / "a")
    Record(id="abcd1234", project="entrl", entity="lab", name="a").save(folder)
    there = replace(read_run(folder), folder=tmp_path / "wandb:lab", manifest={"wandb": {"id": "abcd1234"}})
    monkeypatch.setitem(sys.modules, "rl.report.wandb_runs", types.SimpleNamespace(fetch=lambda spec: [there]))
    found, notes = gather([str(folder), "wandb:lab/entrl"])
    assert [run.folder for run in found] == [folder] and any("counted once" in note for note in notes)


def test_a_run_that_cannot_be_read_is_left_out_of_a_folder_and_an_error_by_name(runs):
    (runs / "with_s1" / "config.yaml").write_text("a: [")
    found, notes = gather([str(runs)])
    assert len(found) == 5 and any("no readable yaml" in note for note in notes)
    with pytest.raises(ReportError, match="no readable yaml"):
        gather([str(runs / "with_s1")])


def test_runs_without_samples_or_numbers_are_compared_in_what_they_have(tmp_path):
    write_run(tmp_path / "a", kept=False)
    b = write_run(tmp_path / "b", plugin=FORK, seed=2)
    (b / "eval" / "after.parquet").write_bytes(b"PAR1 cut off")
    (b / "metrics.jsonl").write_text('{"step": 1, "reward/mean": NaN}\n{"step": 2, "rewa')
    found = compare(gather([str(tmp_path)])[0])
    assert found.pairs[0].difference is None and "reward" not in found.results[1].cells
    assert "reward" in found.names
    assert found.results[1].cells["pass@1"].runs == 1


def test_a_cell_says_of_how_many_runs_it_is(runs, capsys):
    summary = runs / "plain_s1" / "summary.json"
    summary.write_text(json.dumps({"seconds": {"total": 36.0}}))
    show_comparison([str(runs)], {}, wandb=False)
    assert re.search(r"pass@1 +0\.\d+ \[[^]]+\] \(2 of 3\)", capsys.readouterr().out)


def test_methods_on_different_problems_are_compared_on_those_they_share(tmp_path):
    write_run(tmp_path / "a", rates=(0.5,) * 8)
    write_run(tmp_path / "b", plugin=FORK, rates=(0.25,) * 4 + (0.75,) * 12)
    write_run(tmp_path / "c", plugin={"steer": {}}, prompt="another {}")
    found = compare(gather([str(tmp_path)])[0])
    ab, ac, _ = found.pairs
    assert ab.problems == 8 and ab.difference.value == pytest.approx(0.0)  # 4 of -0.25, 4 of +0.25
    assert ac.problems == 0 and ac.difference is None and ac.holm is None
    assert any("Not all methods were evaluated on the same" in note for note in found.notes)


def test_many_methods_wrap_and_are_tested_against_the_first(tmp_path, capsys):
    for i in range(12):
        write_run(tmp_path / f"{i:02}", config={"trainer.learning_rate": i * 1e-4, "trainer.a_rather_long_name": i})
    show_comparison([str(tmp_path)], {"json": tmp_path / "it.json"}, wandb=False)
    shown = capsys.readouterr().out
    assert all(len(line) <= WIDEST for line in shown.splitlines() if str(tmp_path) not in line)
    assert "…" not in shown
    assert len(re.findall(r"^pass@1 ", shown, re.MULTILINE)) > 1
    found = json.loads((tmp_path / "it.json").read_text())
    assert {pair["a"] for pair in found["pairs"]} == {"A"} and len(found["pairs"]) == 11
    assert [letter(i) for i in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


def test_numbers_stay_whole_on_a_narrow_terminal(runs, capsys):
    show(compare(gather([str(runs)])[0]), Console(width=40, highlight=False))
    shown = capsys.readouterr().out
    assert re.search(r"\+0\.156 \[\+0\.\d{3}, \+0\.\d{3}\] +0\.\d{4} +0\.\d{4} ", shown) and "…" not in shown


def test_several_sets_are_tasks(tmp_path):
    for seed in (1, 2):
        run = write_run(tmp_path / f"s{seed}", seed=seed, kept=False)
        sets = {
            name: {"after": {"pass@1": rate, "pass@1/low": 0.0, "pass@1/high": 1.0}}
            for name, rate in (("easy", 0.8), ("hard", 0.1 * seed))
        }
        (run / "summary.json").write_text(json.dumps({"eval": sets["easy"], "sets": sets}))
    cells = compare(gather([str(tmp_path)])[0]).results[0].cells
    assert cells["pass@1 of hard"].value == pytest.approx(0.15)
    assert cells["pass@1, all sets"].value == pytest.approx((0.2 + 0.8) / 2)  # of .8 .8 .1 .2 the middle two


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "is not there"),
        (["empty"], "has no run in it"),
        (["begun"], "no run there has made a step"),
        (["run", "--csv=x", "--json=x"], "name the same file"),
        (["run", "--csv=empty"], "is a folder"),
        (["run", "--json=run/config.yaml/x.json"], "cannot be written"),
        (["newer"], "Update entrl"),
        (["run", "seed=1"], "takes no overrides"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_nothing_is_written(tmp_path, arguments, says, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    begun = write_run(tmp_path / "begun", steps=0, state="")
    newer = write_run(tmp_path / "newer")
    (newer / "manifest.json").write_text('{"format": 99}')
    before = {path for path in tmp_path.rglob("*")}
    assert main(["compare", *arguments]) == 2
    assert says in capsys.readouterr().err and begun.exists()
    assert {path for path in tmp_path.rglob("*")} == before


def test_runs_of_wandb_and_a_view_there_are_the_other_modules_(runs, monkeypatch, capsys):
    import sys
    import types

    asked = {}
    fetched = types.SimpleNamespace(
        fetch=lambda spec: asked.setdefault(spec, read(runs / "plain_s1", runs / "with_s1"))
    )
    view = types.SimpleNamespace(publish=lambda found, groups: asked.update(groups=groups) or "https://wandb.test/view")
    monkeypatch.setitem(sys.modules, "rl.report.wandb_runs", fetched)
    monkeypatch.setitem(sys.modules, "rl.report.wandb_view", view)
    show_comparison(["wandb:lab/entrl"], {}, wandb=True)
    assert "wandb:lab/entrl" in asked and "https://wandb.test/view" in capsys.readouterr().out
    assert {label: [run.name for run in found] for label, found in asked["groups"].items()} == {
        "plugin=none": ["plain_s1"],
        "plugin=fork_mask": ["with_s1"],
    }
