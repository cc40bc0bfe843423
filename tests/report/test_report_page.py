"""The frame of every page: its data arrives, text stays text, nothing is requested, both themes work."""

import pytest

from rl.errors import ReportError
from rl.report import page


@pytest.fixture
def template(monkeypatch):
    from jinja2 import ChoiceLoader, DictLoader

    def use(body):
        environment = page._environment.__wrapped__()
        text = '{% extends "base.html.j2" %}{% block main %}' + body + "{% endblock %}"
        environment.loader = ChoiceLoader([DictLoader({"test.html.j2": text}), environment.loader])
        monkeypatch.setattr(page, "_environment", lambda: environment)
        return "test.html.j2"

    return use


CHART = '<figure class="chart"><h3>entropy</h3><div class="plot" data-chart="entropy"></div></figure>'


def figure(count=50):
    steps = list(range(count))
    line = {
        "type": "scatter",
        "x": steps,
        "y": page.numbers(s**0.5 for s in steps),
        "line": {"color": "c1"},
        "name": "mean",
    }
    return {"entropy": {"data": [line], "layout": {"xaxis": {"title": {"text": "step"}}}}}


def test_a_page_draws_its_charts_from_what_is_in_it(tmp_path, browser, template):
    page.write_page(tmp_path / "a.html", template(CHART), {"title": "a run"}, {"charts": figure()}, charts=True)
    shown = browser(tmp_path / "a.html")
    shown.wait("document.body.dataset.ready === 'charts'")
    assert shown.run("return document.querySelectorAll('.plot .scatterlayer path.js-line').length") == 1
    assert shown.errors() == [] and shown.requests() == []


def test_the_theme_follows_the_system_and_the_button(tmp_path, browser, template):
    page.write_page(tmp_path / "a.html", template(CHART), {"title": "a run"}, {"charts": figure()}, charts=True)
    background = "return getComputedStyle(document.body).backgroundColor"
    line = "return getComputedStyle(document.querySelector('.plot path.js-line')).stroke"
    shown = browser(tmp_path / "a.html", dark=True)
    shown.wait("document.body.dataset.ready === 'charts'")
    dark, dark_line = shown.run(background), shown.run(line)
    shown.find("#theme").click()
    assert dark == "rgb(18, 22, 28)" and shown.run(background) == "rgb(255, 255, 255)"
    assert shown.run(line) != dark_line


def test_text_stays_text_and_data_comes_as_it_was(tmp_path, browser, template):
    evil = "</script><script>window.broken = 1</script><b>&amp;"
    page.write_page(
        tmp_path / "a.html",
        template("<p id='said'>{{ said }}</p>"),
        {"title": evil, "said": evil},
        {"text": {"evil": evil, "n": [1.5, None]}},
    )
    shown = browser(tmp_path / "a.html")
    assert shown.find("#said").text == evil and shown.find("h1").text == evil
    assert shown.run("return window.broken") is None
    shown.run("entrl.data('text').then(d => window.got = d)")
    assert shown.wait("window.got") == {"evil": evil, "n": [1.5, None]}


def test_a_page_that_tries_to_load_something_gets_nothing(tmp_path, browser, template):
    page.write_page(tmp_path / "a.html", template('<img src="https://example.org/x.png" alt="">'), {"title": "x"}, {})
    assert any("Content Security Policy" in e or "violates" in e for e in browser(tmp_path / "a.html").errors())


def test_a_page_too_large_or_without_a_place_is_refused(tmp_path, template, monkeypatch):
    name = template("x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        page.write_page(tmp_path / "file" / "a.html", name, {"title": "x"}, {})
    monkeypatch.setattr(page, "MAX_BYTES", 100)
    with pytest.raises(ReportError, match="Show less"):
        page.write_page(tmp_path / "a.html", name, {"title": "x"}, {})
    assert not (tmp_path / "a.html").exists()


def test_numbers_are_short_and_finite():
    assert page.numbers([0.123456, float("nan"), float("inf"), None, 123456.0]) == [0.1235, None, None, None, 123500.0]
