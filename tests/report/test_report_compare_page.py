"""The page of a comparison in a browser: methods switched off and on, tables sorted, labels that are no markup."""

import pytest

from rl.report.compare_page import write_comparison
from rl.report.compared import compare
from rl.report.gather import gather
from synthetic import write_run

EVIL = "<img src=x onerror='window.broken=1'>"
READY = "document.body.dataset.ready === 'charts'"


@pytest.fixture
def page(tmp_path, browser):
    for i, rate in enumerate((0.5, 0.25, 0.75)):
        for seed in (1, 2):
            folder = tmp_path / "runs" / f"m{i}_s{seed}"
            write_run(folder, seed=seed, rates=(rate,) * 8, steps=30, config={"model.name": f"m{i}{EVIL}"})
    out = write_comparison(compare(gather([str(tmp_path / "runs")])[0]), tmp_path / "compare.html")

    def opened(**how):
        shown = browser(out, **how)
        shown.wait(READY)
        return shown

    return opened


def column(shown, table, number):
    return shown.run(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[arguments[1]].textContent.trim())",
        table,
        number,
    )


def lines(shown, chart):
    return shown.run(f"return document.querySelectorAll('[data-chart={chart}] .scatterlayer .js-line').length")


def test_everything_is_drawn_and_nothing_is_asked_for(page):
    shown = page()
    for chart in ("reward", "entropy", "consumed", "top20"):
        assert lines(shown, chart) >= 3, chart
    assert lines(shown, "pass_at") == 4  # and before training
    assert shown.run("return document.querySelectorAll('[data-chart=seeds] .point').length") == 9
    assert shown.errors() == [] and shown.requests() == []


def test_labels_are_text(page):
    shown = page()
    assert EVIL in shown.find(".methods").text
    assert shown.run("return window.broken") is None and shown.run("return document.images.length") == 0


def test_a_method_is_switched_off_in_charts_and_tables_and_stays_off_in_the_other_theme(page):
    shown = page()
    before = lines(shown, "pass_at")
    shown.find("[data-method='1']").click()
    assert lines(shown, "pass_at") == before - 1
    assert (
        len(column(shown, "#numbers", 0)) == 2 and column(shown, ".pairs", 0) == ["C - A"] * 2
    )  # over problems, over seeds
    shown.find("#theme").click()
    assert lines(shown, "pass_at") == before - 1
    shown.find("#none").click()
    assert lines(shown, "pass_at") == 1 and column(shown, "#numbers", 0) == []
    shown.find("#all").click()
    assert lines(shown, "pass_at") == before and len(column(shown, "#runs", 0)) == 6


def test_a_table_is_sorted_by_numbers_with_a_click_or_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    shown = page()
    names = column(shown, "#numbers", 0)
    heading = next(b for b in shown.driver.find_elements("css selector", "#numbers .sort") if b.text == "pass@1")
    place = shown.run("return arguments[0].closest('th').cellIndex", heading)
    heading.click()
    values = column(shown, "#numbers", place)
    assert [float(v.split()[0]) for v in values] == [0.25, 0.5, 0.75]
    assert shown.run("return arguments[0].closest('th').getAttribute('aria-sort')", heading) == "ascending"
    heading.send_keys(Keys.ENTER)
    assert [float(v.split()[0]) for v in column(shown, "#numbers", place)] == [0.75, 0.5, 0.25]
    first = shown.find("#numbers .sort")
    first.send_keys(Keys.SPACE)
    assert column(shown, "#numbers", 0) == names


def test_a_narrow_window_scrolls_tables_and_not_the_page(page):
    shown = page(width=500)
    assert shown.run("return document.documentElement.scrollWidth <= window.innerWidth")
