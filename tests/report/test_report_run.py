"""The report of a run: what it says of a finished, a killed, an old and an edited one, and what it does in a browser."""

import json
import re

import pytest

from rl.errors import ReportError
from rl.report import facts
from rl.report.page import MAX_BYTES
from rl.report.reading import read_run
from rl.report.run_charts import sections
from rl.report.run_page import write_report
from synthetic_run import CONFIG, write_run


@pytest.fixture
def made(tmp_path):
    return write_run(tmp_path / "a")


def words(page):
    """The text of a page's own markup, without its data and scripts."""
    html = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def charts(folder):
    return {chart.name: chart for section in sections(read_run(folder)) for chart in section.charts}


def test_a_report_says_how_it_ended_and_the_key_numbers(made):
    said = words(write_report(made))
    assert (made / "report.html").stat().st_size < MAX_BYTES
    assert "done" in said and "steps 40 of 40" in said and "plug-ins fork_mask" in said
    assert "0.250 → 0.500 95 % interval 0.20 to 0.30" in said  # pass@1
    assert "fork_mask touched 80.0% of the tokens and left 20.0% of the advantage mass" in said
    assert "rollout 2 s (10 %)" in said and "rest: start, checkpoints, logging 7 s (35 %)" in said


def test_a_long_run_with_many_series_stays_a_small_page(tmp_path):
    folder = write_run(tmp_path / "a", steps=2000, extra=44)
    assert write_report(folder).stat().st_size < MAX_BYTES
    found = charts(folder)
    shown = {column for chart in found.values() for column in chart.series}
    assert {f"my/series_{i}" for i in range(44)} <= shown  # nothing is hidden
    assert len(found["entropy_map"].figure["data"][0]["x"]) == 400
    assert all(len(t["x"]) <= 1000 for c in found.values() if c.figure and c.over_steps for t in c.figure["data"])
    assert "each point the mean of 2 steps" in words(folder / "report.html")


def test_rewards_share_a_chart_and_what_they_log_besides_is_no_reward(made):
    found = charts(made)
    assert [t["name"] for t in found["reward"].figure["data"]] == ["all together", "correct", "format"]
    assert "reward/unparsed" in found["others_other_1"].series
    (made / "config.yaml").write_text(CONFIG.replace("  format: {weight: 1.0}\n", ""))
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    alone = [line | {"reward/mean": line["reward/correct"]} for line in lines]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alone))
    assert [t["name"] for t in charts(made)["reward"].figure["data"]] == ["correct"]  # the only one: not twice


def test_a_run_killed_in_the_middle_of_a_line_says_so(made):
    with open(made / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 41, "reward/mean": 0.')
    (made / "DONE").unlink()
    said = words(write_report(made))
    assert "1 line of metrics.jsonl cannot be read" in said and "killed hard; its last step is of 2027-01-15" in said


@pytest.mark.parametrize("state", ["FAILED", "STOPPED"])
def test_a_run_that_ended_badly_says_why(tmp_path, state):
    folder = write_run(tmp_path / "a", marker=state, reason="ValueError: \x1b[31m<b>no</b>", summary=False)
    said = write_report(folder).read_text()
    assert "ValueError: \\x1b[31m&lt;b&gt;no&lt;/b&gt;" in said and state.lower() in said
    assert "no evaluation before or after training" in said


def test_a_run_that_an_alarm_stopped_says_so(made):
    summary = json.loads((made / "summary.json").read_text()) | {"stopped_by": "entropy_slope"}
    (made / "summary.json").write_text(json.dumps(summary))
    assert "done ended early, by the alarm entropy_slope" in words(write_report(made))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_of_hardly_any_steps_has_a_report(tmp_path, steps):
    folder = write_run(tmp_path / "a", steps=steps, summary=False, marker=None)
    said = words(write_report(folder))
    assert ("No step is in metrics.jsonl" in said) == (steps == 0)
    assert ("of the only step" in said) == (steps == 1)


def test_what_a_run_lacks_is_named_with_its_reason_and_has_no_chart(made):
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["rollout/len"] = None  # what is not finite
        del line["entropy/hist"]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, page = words(write_report(made)), (made / "report.html").read_text()
    assert "Completion length (no step has rollout/len)" in said and 'data-chart="length"' not in page
    assert "Where the tokens are (the run logged no entropy/hist)" in said and 'data-chart="entropy_map"' not in page
    assert "KL to the reference model (it is computed where trainer.beta is above 0)" in said


def test_alarms_are_listed_once_each_and_marked_in_every_chart(made):
    raised = [{"step": step, "alarm": "floor", "text": f"entropy at <step> {step}"} for step in (7, 9)]
    (made / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in raised) + '{"step": 1')
    page = write_report(made)
    assert "floor , step 7 and 1 more, last 9: entropy at &lt;step&gt; 7" in words(page)
    shapes = {c.name: c.figure["layout"].get("shapes") for s in sections(read_run(made), [7, 9]) for c in s.shown}
    assert [shape["x0"] for shape in shapes["reward"]] == [7, 9] and shapes["law"] is None


def test_a_method_that_did_nothing_is_called_out(made):
    text = (
        (made / "metrics.jsonl")
        .read_text()
        .replace('"plugin/fork_mask/touched": 0.8', '"plugin/fork_mask/touched": 0.0')
    )
    (made / "metrics.jsonl").write_text(text)
    assert "It did nothing." in words(write_report(made))


def test_shadows_and_forecasts_are_shown_where_a_run_has_them(made):
    assert charts(made)["shadows"].figure is None and charts(made)["forecast"].figure is None
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"plugin/steer/touched": 0.6, "shadow/steer/jaccard": 0.3, "shadow/steer/cosine": 0.5}
        line |= {"forecast/ceiling": 0.8}
        line |= {"forecast/low": 0.7, "forecast/high": 0.9, "forecast/departed": float(line["step"] > 30)}
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = charts(made)
    assert [t["name"] for t in found["shadows"].figure["data"]] == ["steer jaccard", "steer cosine"]
    assert [t["name"] for t in found["touched"].figure["data"]] == ["fork_mask", "steer (shadow)"]
    assert [t["name"] for t in found["forecast"].figure["data"]] == ["lower end", "upper end", "forecast", "reward"]
    assert found["forecast"].note.startswith("In 10 steps, first 31,")


def test_a_shadow_is_not_said_to_have_acted(made):
    text = (made / "metrics.jsonl").read_text().replace('"plugin/fork_mask/kept"', '"shadow/fork_mask/cosine"')
    (made / "metrics.jsonl").write_text(text)
    (made / "config.yaml").write_text(CONFIG.replace("rho: 0.3", "rho: 0.3, shadow: true"))
    said = words(write_report(made))
    assert "plug-ins none: plain GRPO shadows fork_mask" in said
    assert "only watched: it would touch 80.0% of the tokens and leave 20.0% of plain GRPO" in said
    assert [t["name"] for t in charts(made)["touched"].figure["data"]] == ["fork_mask (shadow)"]


def test_settings_that_differ_from_the_default_are_listed_without_secrets(tmp_path):
    config = CONFIG + "logger: {api_key: hunter2, project: mine}\n"
    said = words(write_report(write_run(tmp_path / "a", config=config)))
    assert "plugin.fork_mask.rho" in said and "logger.project entrl mine" in said and "hunter2" not in said


@pytest.mark.parametrize(
    "config", ["{}\n", "plugin: fork_mask\nreward: [correct]\nmodel: 3\ndata: null\ntrainer: []\n"]
)
def test_an_edited_configuration_is_shown_as_it_is(tmp_path, config):
    write_report(write_run(tmp_path / "a", config=config))


def test_a_resumed_run_says_how_often_it_was_started(made):
    (made / "logs" / "attempt_2").mkdir()
    run = read_run(made)
    assert ("starts", "2") in facts.origin(run)
    assert [name for name, _ in facts.time_split(run)] == ["rollout", "training", "evaluation"]  # the rest is not known


def test_an_old_folder_is_read_and_a_newer_one_refused(tmp_path):
    assert read_run(write_run(tmp_path / "old", version=1)).format == 1
    write_report(tmp_path / "old")
    with pytest.raises(ReportError, match="Update entrl"):
        write_report(write_run(tmp_path / "new", version=99))


def test_what_is_no_run_and_where_nothing_can_be_written_is_one_sentence(tmp_path, made):
    with pytest.raises(ReportError, match="no run folder"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(made, made / "config.yaml" / "report.html")
    with pytest.raises(ReportError, match="Is a directory"):
        write_report(made, made / "logs")
    assert not list(made.glob(".*"))  # nor is anything left of it
    (made / "config.yaml").write_text("- a\n")
    with pytest.raises(ReportError, match="holds no settings but a list"):
        write_report(made)


def test_pages_beside_the_report_are_linked_from_where_it_is(tmp_path, made):
    (made / "lens.html").write_text("x")
    assert 'href="lens.html"' in write_report(made).read_text()
    assert 'href="../a/lens.html"' in write_report(made, tmp_path / "elsewhere" / "r.html").read_text()


def test_lines_that_are_json_by_chance_are_no_steps(made):
    with open(made / "metrics.jsonl", "a") as metrics:
        metrics.write('4\n{"reward/mean": 1}\n{"step": 41, "reward/mean": "much"}\n')
    with open(made / "metrics.jsonl", "ab") as metrics:
        metrics.write(b"\xff\x00{\n")  # what a lost disk may leave
    run = read_run(made)
    assert run.torn == 3 and run.metrics.index[-1] == 41 and run.metrics["reward/mean"].isna().iloc[-1]
