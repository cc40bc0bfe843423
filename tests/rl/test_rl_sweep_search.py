"""A search: what Optuna proposes becomes run folders, what they come to is told, and a retry goes on."""

import sys

import pytest

from command_line import SMALL, fails
from fake_run import fake
from rl import rundir
from rl.config import compose
from rl.sweep.folder import read_points
from rl.sweep.status import standings
from rl.sweep.verb import retry, sweep

optuna = pytest.importorskip("optuna")

FILE = """# a search
optuna: {metric: eval.after.pass@1, trials: 4}
overrides:
  - plugin=[steer],[steer,fork_mask]
  - plugin.steer.w_min=interval(0.1,0.9)
  - trainer.learning_rate=tag(log,interval(1e-6,1e-3))
  - seed=3
"""


def run(tmp_path, command, *words, text=FILE):
    folder = tmp_path / "mine" / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "it.yaml").write_text(text)
    words = ["sweep=it", *SMALL, "eval.before=false", f"run.dir={tmp_path / 'runs'}", "sweep.name=it", *words]
    return sweep(words, str(tmp_path / "mine"), ["sweep", *words], command)


def study(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "it" / "optuna.journal"))
    return optuna.load_study(study_name="it", storage=optuna.storages.JournalStorage(backend))


def test_a_search_runs_its_trials_and_says_the_best(tmp_path, capsys):
    assert run(tmp_path, fake(tmp_path, 0.1, 0.3, 0.2, 0.15), "launcher.at_once=2") == 0
    folder = tmp_path / "runs" / "it"
    points = read_points(folder)
    assert [s.state for s in standings(folder)] == ["done"] * 4 and points[0].steps == 2
    for point, trial in zip(points, study(tmp_path).trials, strict=True):
        cfg = compose((folder / point.folder / "overrides.txt").read_text().splitlines())
        assert cfg.plugin.steer.w_min == trial.params["plugin.steer.w_min"] and 0.1 <= cfg.plugin.steer.w_min <= 0.9
        assert cfg.trainer.learning_rate == trial.params["trainer.learning_rate"] and cfg.seed == 3
        assert f"[{','.join(cfg.plugin)}]" == trial.params["plugin"] and cfg.run.group == "it"
    assert len({p.folder for p in points}) == 4 and points[0].folder.startswith("001_plugin-steer")
    said = capsys.readouterr().out
    assert f"best       {folder / points[1].folder}: eval.after.pass@1=0.3" in said
    assert [t.value for t in study(tmp_path).trials] == [0.1, 0.3, 0.2, 0.15]


def test_a_retry_finishes_the_study_and_goes_on_with_it(tmp_path, capsys):
    command = fake(tmp_path, 0.1, "crash", 0.2)
    assert run(tmp_path, command, "sweep.trials=3") == 1
    assert [t.state.name for t in study(tmp_path).trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    first = [p.overrides for p in read_points(tmp_path / "runs" / "it")]
    fake(tmp_path, 0.9, 0.4, 0.9, 0.3)
    assert retry(str(tmp_path / "runs" / "it"), ["sweep.trials=4"], command) == 0
    trials = study(tmp_path).trials
    assert [t.value for t in trials if t.value is not None] == [0.1, 0.2, 0.4, 0.3]
    assert trials[3].params == trials[1].params  # the failed one, run again
    points = read_points(tmp_path / "runs" / "it")
    assert [p.overrides for p in points[:3]] == first and points[3].overrides not in first
    assert "002_" in next(line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("best"))
    # a point that ended while nobody was there to tell the study
    (tmp_path / "runs" / "it" / points[3].folder / "DONE").unlink()
    assert [s.state for s in standings(tmp_path / "runs" / "it")][3] == "lost"


def test_a_point_that_ended_unseen_is_told_later(tmp_path):
    command = fake(tmp_path, 0.1, "crash")
    run(tmp_path, command, "sweep.trials=2")
    folder = tmp_path / "runs" / "it"
    trial = study(tmp_path).ask()  # the state a killed launcher leaves: asked and written, ended by itself, never told
    trial.set_user_attr("point", 2)
    rundir.finish(folder / read_points(folder)[1].folder, "DONE")
    (folder / read_points(folder)[1].folder / "summary.json").write_text('{"eval": {"after": {"pass@1": 0.6}}}')
    assert retry(str(folder), [], ["false"]) == 0
    assert study(tmp_path).best_value == 0.6


def test_what_a_search_refuses(tmp_path, capsys):
    def refused(*words, text=FILE):
        folder = tmp_path / "mine" / "sweep"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "it.yaml").write_text(text)
        runs = f"run.dir={tmp_path / 'runs'}"
        said = fails(capsys, "sweep", "sweep=it", *SMALL, runs, "--config-dir", str(tmp_path / "mine"), *words)
        assert not (tmp_path / "runs").exists()
        return said

    assert "a job array does not wait" in refused("launcher=slurm")
    assert "launcher.at_once=0 does not work" in refused("launcher.at_once=0")
    assert "there is nothing to search" in refused(text=FILE.split("  - plugin=")[0] + "  - seed=3\n")
    assert "optuna.trial is not known. Did you mean trials?" in refused(text=FILE.replace("trials", "trial"))


def test_both_ends_of_every_range_are_checked_first(tmp_path, capsys):
    text = FILE.replace("interval(0.1,0.9)", "interval(0.1,-0.9)").replace("0.1,-0.9", "-0.9,0.1")
    with pytest.raises(ValueError, match="points cannot run; nothing was written"):
        run(tmp_path, ["false"], text=text)
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_no_run_has_ends_the_search_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="optuna.metric=eval.after.pass@9 is not in .*summary.json"):
        run(tmp_path, fake(tmp_path), text=FILE.replace("pass@1", "pass@9"))
    assert len(read_points(tmp_path / "runs" / "it")) == 1


def test_without_optuna_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="a search needs Optuna, which is not installed"):
        run(tmp_path, ["false"])
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, ["false"], "dry_run=true", "sweep.trials=7") == 0
    assert "7 trials would go to" in capsys.readouterr().out and not (tmp_path / "runs").exists()
