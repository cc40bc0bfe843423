"""The view that entrl compare --wandb makes, and reading a W&B project."""

import json
import sys
import time
from importlib.resources import files
from urllib.parse import unquote

import pytest
import yaml

from rl.errors import ReportError
from rl.report.reading import read_run
from rl.report.wandb_runs import fetch
from rl.report.wandb_view import COLORS, group_keys, publish, view_of
from rl.wandb_run import Record, set_names
from wandb_server import Server, forget, use

SERIES = [
    "entropy/mean",
    "entropy/p80",
    "entropy/predicted_change",
    "reward/mean",
    "reward/correct",
    "rollout/len",
    "mine/own",
]
FORK = {"fork_mask": {"_target_": "ForkMask", "rho": 0.2}}


@pytest.fixture
def server(monkeypatch, tmp_path_factory):
    with Server() as server:
        use(monkeypatch, tmp_path_factory.mktemp("home"), server.url)
        yield server
        forget()


def run(folder, name, plugin, seed=1, series=(), project="p", delivered=2, group="sweep"):
    folder = folder / name
    folder.mkdir()
    config = {
        "plugin": plugin,
        "trainer": {"lr": 0.1},
        "reward": {},
        "run": {"name": name, "group": group},
        "seed": seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"name": "countdown"}}))
    lines = [{"step": step, **dict.fromkeys([*SERIES, *series], 0.5), "time/at": 1.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = {"pass@1": 0.5, "pass@1/low": 0.4, "pass@8": 0.8, "greedy": 0.5, "len": 9.0}
    (folder / "summary.json").write_text(json.dumps({"eval": {"before": evaluated, "after": evaluated}}))
    if delivered is not None or project != "p":
        Record(f"id{name}", project, "me", name, delivered=delivered).save(folder)
    return read_run(folder)


@pytest.fixture
def methods(tmp_path):
    audit = ["plugin/fork_mask/kept", "plugin/fork_mask/touched"]
    return {
        "plugin=": [run(tmp_path, f"plain{seed}", {}, seed) for seed in (1, 2)],
        "plugin=fork_mask": [run(tmp_path, f"fork{seed}", FORK, seed, audit) for seed in (1, 2)],
    }


def flat(methods):
    return [run for of in methods.values() for run in of]


def spec_of(view):
    return json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))["section"]


def test_the_view_has_entropy_first_and_every_series_against_the_training_step(methods):
    spec = spec_of(view_of(flat(methods), methods, "me", "p"))
    sections = spec["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Entropy",
        "Reward",
        "Evaluation",
        "Rollouts",
        "Plug-ins: what each did to the tokens",
        "Everything else",
        "Settings that differ",
    ]
    lines = [p["config"] for s in sections for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
    assert {line["xAxis"] for line in lines} == {"train/global_step"} == {spec["settings"]["xAxis"]}
    drawn = [name for line in lines for name in line["metrics"]]
    assert sorted(drawn) == sorted([*SERIES, "plugin/fork_mask/kept", "plugin/fork_mask/touched"])  # each once
    assert drawn[0] == "entropy/mean" and drawn[-1] == "mine/own"
    bars = {p["config"]["chartTitle"]: p["config"]["metrics"] for p in sections[2]["panels"]}
    assert list(bars) == [f"{m} of countdown, before and after" for m in ("pass@1", "pass@8", "greedy")]
    assert bars["pass@8 of countdown, before and after"] == ["eval/countdown/before/pass@8", "eval/countdown/pass@8"]


def test_the_view_shows_these_runs_only_a_colour_a_method_with_seeds_as_one_line(methods):
    spec = spec_of(view_of(flat(methods), methods, "me", "p"))
    [runs] = spec["runSets"]
    [only] = runs["filters"]["filters"]
    assert only["key"] == {"section": "run", "name": "name"}  # W&B's word for the id
    assert (only["op"], only["value"]) == ("IN", ["idfork1", "idfork2", "idplain1", "idplain2"])
    assert runs["grouping"] == [{"section": "config", "name": "entrl.value.plugins"}]
    colors = spec["customRunColors"]
    css = (files("rl.report") / "assets" / "base.css").read_text().partition("@media")[0]
    assert [css.partition(f"--c{i}: ")[2][:7] for i in range(1, 9)] == list(COLORS)
    assert colors["idplain1"] == colors["idplain2"] == COLORS[0] and colors["idfork1"] == COLORS[1]
    assert lines_of(colors) == {"grpo": COLORS[0], "fork_mask": COLORS[1]}
    single = {label: of[:1] for label, of in methods.items()}
    assert spec_of(view_of(flat(single), single, "me", "p"))["runSets"][0]["grouping"] == []


def lines_of(colors):
    """Colours by what W&B groups by: it keys them by the run set and the path to the group, as JSON in an URL's letters."""
    paths = {unquote(key.split(":")[2]): color for key, color in colors.items() if key.startswith("run-color-group:")}
    return {json.loads(path)[0]["value"]: color for path, color in paths.items()}


def test_what_tells_methods_apart_is_what_they_are_grouped_by(tmp_path):
    def method(name, rho, group="sweep"):
        plugin = {} if rho is None else {"fork_mask": {"rho": rho}}
        return [run(tmp_path, f"{name}{seed}", plugin, seed, group=group) for seed in (1, 2)]

    few, many, none, other = method("a", 0.1), method("b", 0.2), method("c", None), method("d", 0.1, "other")
    assert group_keys({"none": none, "few": few}) == ["entrl.plugins"]
    assert group_keys({"few": few, "many": many}) == ["plugin.fork_mask.rho"]
    assert group_keys({"few": few, "many": many, "none": none}) == ["entrl.plugins", "plugin.fork_mask.rho"]
    assert group_keys({"few": few, "other": other}) == ["group", "entrl.plugins"]


def test_a_shadow_tells_no_methods_apart(tmp_path):
    plain, steering = {"fork_mask": {"rho": 0.1}}, {"steer": {"w_min": 0.7}}
    watched = {**plain, "steer": {"w_min": 0.5, "shadow": True}}
    masked = [run(tmp_path, "a1", watched, 1, group="g"), run(tmp_path, "a2", plain, 2, group="g")]
    steered = [run(tmp_path, f"b{seed}", steering, seed, group="g") for seed in (1, 2)]
    assert group_keys({"masked": masked, "steered": steered}) == ["entrl.plugins"]


def test_the_same_runs_have_one_view_which_stays_as_it_was_edited(server, methods, tmp_path, capsys):
    url = publish(flat(methods), methods)
    [(name, saved)] = server.views.items()
    assert url == f"{server.url}/me/p?nw={name.removeprefix('nw-').removesuffix('-v')}"
    assert (saved["entityName"], saved["projectName"], saved["type"]) == ("me", "p", "project-view")
    assert saved["displayName"] == "entrl: plugin , plugin fork_mask"
    assert json.loads(saved["spec"])["section"]["panelBankConfig"]["sections"][0]["name"] == "Entropy"
    saved["displayName"] = "edited"
    assert publish(flat(methods)[::-1], methods) == url
    assert len(server.views) == 1 and server.views[name]["displayName"] == "edited"
    methods["plugin=fork_mask"].append(run(tmp_path, "fork3", FORK, 3))
    assert publish(flat(methods), methods) != url and len(server.views) == 2
    assert capsys.readouterr() == ("", "")  # who calls it prints the address


def test_runs_that_cannot_be_shown(tmp_path, methods):
    def refused(runs):
        with pytest.raises(ReportError) as error:
            publish(runs, {"all": runs})
        return str(error.value)

    off = run(tmp_path, "off", {}, delivered=None)
    assert "off was made without W&B" in refused([off])
    Record("x", "p", "me", "off").save(off.folder)
    (off.folder / "wandb" / "offline-run-1-x").mkdir(parents=True)
    assert f"Deliver it first: entrl sync {off.folder}" in refused([off])


def test_runs_of_two_projects_are_not_one_view(server, tmp_path):
    runs = [run(tmp_path, "a", {}), run(tmp_path, "b", {}, project="q")]
    with pytest.raises(ReportError, match="these runs are in me/p, me/q. Give runs of one of them"):
        publish(runs, {"all": runs})
    assert not server.views


@pytest.mark.parametrize("ask", [lambda runs: publish(runs, {"all": runs}), lambda runs: fetch("wandb:me/p")])
@pytest.mark.parametrize(
    "trouble, said",
    [
        ("no key", "none was found in WANDB_API_KEY or ~/.netrc. Run wandb login."),
        (401, "Look at the network, the key"),
        ("gone", "Look at the network, the key"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_sentence(server, tmp_path, monkeypatch, trouble, said, ask):
    if trouble == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif trouble == "gone":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setattr("rl.report.wandb_runs._TIMEOUT", 1)
    else:
        server.behaviour = trouble
    start = time.perf_counter()
    with pytest.raises(ReportError) as error:
        ask([run(tmp_path, "a", {})])
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    assert time.perf_counter() - start < 60


def test_without_wandb_workspaces_it_says_what_to_install(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ReportError, match="pip install wandb-workspaces"):
        publish(runs := [run(tmp_path, "a", {})], {"all": runs})


@pytest.mark.parametrize("spec", ["wandb:", "wandb:me", "wandb:/p", "wandb:me//g"])
def test_a_place_that_is_none(spec):
    with pytest.raises(ReportError, match="Expected wandb:entity/project"):
        fetch(spec)


def test_only_runs_of_entrl_are_read(server, capsys):
    with pytest.raises(ReportError, match="Could not find project"):
        fetch("wandb:me/p")
    server.run("other").info = {"project": "p", "displayName": "other"}
    with pytest.raises(ReportError, match="none of the 1 runs is entrl's"):
        fetch("wandb:me/p")
    ours = server.run("ours")
    ours.info = {"project": "p", "displayName": "team/a", "groupName": "g"}
    ours.config = {key: {"value": {"max_steps": 3}} for key in ("trainer", "reward", "run")}
    rows = [
        {"_step": step, "train/global_step": step, "a": "NaN" if step == 1 else 1.5, "b": "text", "c": "NaN"}
        for step in (1, 2)
    ]
    ours.lines["wandb-history.jsonl"] = {i: json.dumps(row) for i, row in enumerate(rows)}
    ours.exit_code = 0
    [run] = fetch("wandb:me/p")
    assert capsys.readouterr().out == "wandb:me/p: 1 of 2 runs are entrl's, the others are left out\n"
    assert run.name == "team_a" and run.state == "stopped" and list(run.metrics.columns) == ["a", "c"]
    assert run.metrics["a"].isna().tolist() == [True, False]
    ours.lines["wandb-summary.json"] = {0: json.dumps({"seconds/total": 9.0})}
    assert fetch("wandb:me/p")[0].state == "done"  # an alarm ended it, with its evaluation
    with pytest.raises(ReportError, match="there is no run"):
        fetch("wandb:me/p/nothing")
    publish([run], {"": [run]})
    assert len(server.views) == 1


def test_sets_are_called_by_their_names_where_they_have_some():
    gsm, aime = {"name": "gsm8k"}, {"limit": 3}
    assert set_names({"data": {"name": "math"}, "eval": {"sets": {}}}) == ["math"]
    assert set_names({"data": {"name": "mix", "sets": {"a": gsm, "b": aime}}}) == ["gsm8k", "b"]
    assert set_names({"data": {"name": "mix", "sets": {"a": gsm}}, "eval": {"sets": {"aime": aime}}}) == ["aime"]


def test_a_run_without_any_step_is_read(server):
    server.run("ours").info = {"project": "p", "displayName": "a"}
    server.run("ours").config = {key: {"value": {}} for key in ("trainer", "reward", "run")}
    [run] = fetch("wandb:me/p")
    assert run.metrics.empty and run.state == "open"
