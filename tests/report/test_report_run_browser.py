"""The report in a browser: one step in all charts, by mouse and by keyboard, at any width and in both themes."""

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from rl.report.run_page import write_report
from synthetic_run import CONFIG, write_run

EVIL = "</script><script>window.broken = 1</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", config=CONFIG + f"note: {EVIL!r}\n")
    return write_report(folder)


@pytest.fixture
def opened(browser, report):
    def open_it(**how):
        page = browser(report, **how)
        page.wait("document.body.dataset.ready === 'charts'")
        return page

    return open_it


def legend(page, chart):
    return page.run(
        "return document.querySelector(`[data-chart=${arguments[0]}]`).closest('.chart').querySelector('.at').textContent",
        chart,
    )


def marks(page):
    """Where each chart's mark is, as a share of the width of its x axis."""
    return page.run(
        "return [...document.querySelectorAll('.chart.steps .plot')].map(p => (p.querySelector('.mark').offsetLeft"
        " - p._fullLayout.xaxis._offset) / p._fullLayout.xaxis._length)"
    )


def test_a_step_is_marked_in_all_charts_by_slider_and_by_hovering(opened):
    page = opened()
    assert page.errors() == [] and page.requests() == []
    assert page.run("return window.broken") is None and EVIL in page.find("body").text
    last = legend(page, "entropy")
    assert all(0.99 < at < 1.01 for at in marks(page)) and len(marks(page)) > 10
    page.find("#step").send_keys(Keys.HOME)
    assert page.find("#step-is").text == "1" and legend(page, "entropy") != last
    assert all(-0.01 < at < 0.01 for at in marks(page))
    assert page.find("#step").get_attribute("aria-valuetext").startswith("step 1: ")
    page.find("#step").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#step-is").text == "2"
    ActionChains(page.driver).move_to_element(page.find("[data-chart=reward] .nsewdrag")).perform()
    assert page.wait("Math.abs(document.getElementById('step').value - 20) < 4")
    assert all(0.4 < at < 0.6 for at in marks(page))
    assert page.errors() == []


def test_smoothing_draws_a_calmer_line_over_the_logged_one(opened):
    page = opened()
    lines = "return document.querySelector('[data-chart=my], [data-chart=reward]').data.length"
    rough = (
        "const d = document.querySelector('[data-chart=reward]').data.filter(t => t.name === 'all together').at(-1).y;"
        "return d.slice(1).reduce((sum, y, i) => sum + Math.abs(y - d[i]), 0)"
    )
    smoothed, two = page.run(rough), page.run(lines)
    page.find("#smoothing").send_keys(Keys.HOME)
    assert page.find("#smoothing-is").text == "0.00"
    assert page.run(lines) == two / 2 and smoothed < page.run(rough)


def test_every_chart_has_its_numbers_as_a_table(opened):
    page = opened()
    page.run("document.querySelectorAll('details[data-numbers]').forEach(box => box.open = true)")
    charts = page.run("return document.querySelectorAll('.plot').length")
    page.wait(f"document.querySelectorAll('details[data-numbers] tbody').length === {charts}")
    rows = "return [...document.querySelectorAll('[data-numbers={}] tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    entropy, heat = page.run(rows.format("entropy")), page.run(rows.format("entropy_map"))
    assert entropy[0][0] == "1" and entropy[-1][0] == "40" and len(entropy[0]) == 5
    assert [sum(float(row[i]) for row in heat) for i in range(1, len(heat[0]))] == pytest.approx([100] * 8, abs=0.5)
    assert page.errors() == []


@pytest.mark.parametrize("width, dark", [(400, False), (1280, True)])
def test_it_fits_a_narrow_window_and_follows_the_theme(opened, width, dark):
    page = opened(width=width, dark=dark)
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)"
    )
    drawn = page.run(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelector('.main-svg').getBoundingClientRect().right)"
    )
    assert max(drawn) <= page.run("return window.innerWidth")
    assert page.errors() == []
