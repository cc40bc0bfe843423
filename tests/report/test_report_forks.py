"""The page of forks in a browser: forks are chosen by mouse and keys, branches open, text stays text."""

import pytest

from rl.report.forks_page import value_chart, write_forks
from rl.report.text import short, visible, word

EVIL = "<script>window.broken = 1</script>\x1b[31m"


def estimate(value, half=0.1):
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def branch(text, prob, value, gain, token=5, taken=False, **changes):
    return {
        "token": token,
        "text": text,
        "prob": prob,
        "taken": taken,
        "over": False,
        "n": 32,
        "right": round(32 * value),
        "value": estimate(value),
        "gain": {"value": gain, "low": gain - 0.1, "high": gain + 0.1},
        "answers": [["18", 20], [None, 12]],
        "distinct": 2,
        "truncated": 1,
        "examples": [
            {"text": " so 18", "right": True, "truncated": False},
            {"text": EVIL, "right": False, "truncated": True},
        ],
        **changes,
    }


def fork(place, value, *branches):
    return {
        "place": place,
        "entropy": 1.0 + place / 10,
        "logp": -1.0,
        "rank": 2,
        "value": estimate(value),
        "spread": 0.5,
        "branches": list(branches),
    }


@pytest.fixture
def report():
    return {
        "model": "some/model",
        "problem": "problem 3 of gsm8k",
        "prompt": f"Q: {EVIL}",
        "tokens": ["The", " answer", "\n", " is", EVIL, "<eos>"],
        "entropy": [0.1, 1.1, 1.2, 0.2, 0.0, 0.0],
        "completion": "The answer\n is",
        "right": False,
        "truncated": False,
        "measure": "correct",
        "majority": None,
        "start": estimate(0.5),
        "forks": [
            fork(1, 0.5, branch(" answer", 0.6, 0.55, 0.05, taken=True), branch(" sum", 0.3, 0.5, 0.0)),
            fork(
                2,
                0.6,
                branch("\n", 0.5, 0.1, -0.5, taken=True),
                branch(EVIL, 0.4, 0.9, 0.3),
                branch("", 0.1, 0.3, -0.3, token=None),
            ),
        ],
        "drawn": "sample",
        "samples": 32,
        "seed": 0,
        "seconds": 1.5,
        "decoding": {
            "max_new_tokens": 64,
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": 0.0,
            "typical_p": 1.0,
        },
    }


def opened(browser, path, **how):
    shown = browser(path, **how)
    shown.wait("document.body.dataset.ready === 'charts' && document.body.dataset.forks === 'ready'")
    return shown


def test_the_fork_that_mattered_is_open_and_keys_choose_others(tmp_path, browser, report):
    from selenium.webdriver.common.keys import Keys

    shown = opened(browser, write_forks(report, tmp_path / "forks.html"))
    assert shown.find("#fork h2").text.startswith("Fork 2 of 2: token 2")  # where the word taken lost half
    buttons = shown.driver.find_elements("css selector", "#completion button")
    assert len(buttons) == 2 and buttons[1].get_attribute("aria-pressed") == "true"
    assert [b.get_attribute("tabindex") for b in buttons] == ["-1", "0"]
    buttons[1].send_keys(Keys.ARROW_LEFT)
    assert shown.find("#fork h2").text.startswith("Fork 1 of 2: token 1")
    assert shown.run("return document.activeElement.getAttribute('aria-label')").startswith("fork 1")
    buttons[0].send_keys(Keys.END)
    assert shown.find("#fork h2").text.startswith("Fork 2")
    buttons[0].click()
    assert shown.find("#fork h2").text.startswith("Fork 1")
    assert shown.errors() == [] and shown.requests() == []


def test_a_branch_opens_by_a_key_and_shows_what_came_of_it(tmp_path, browser, report):
    from selenium.webdriver.common.keys import Keys

    shown = opened(browser, write_forks(report, tmp_path / "forks.html"))
    branches = shown.driver.find_elements("css selector", ".branch")
    assert len(branches) == 3 and "all other words" in branches[2].text
    first = branches[0].find_element("css selector", "summary")
    assert "0.10 (0.00 to 0.20)" in first.text and "−0.50 (−0.60 to −0.40)" in first.text and "taken" in first.text
    first.send_keys(Keys.ENTER)
    assert branches[0].get_attribute("open") == "true"
    text = branches[0].text
    assert "3 of 32; 1 truncated; 2 different answers, most often 18 (20)" in text and "✓ right" in text
    assert "✗ wrong, truncated" in text and "<script>window.broken = 1</script>\\x1b[31m" in text


def test_text_of_a_model_does_nothing(tmp_path, browser, report):
    path = write_forks(report | {"model": EVIL, "majority": EVIL, "measure": "majority"}, tmp_path / "forks.html")
    shown = opened(browser, path)
    assert shown.run("return window.broken") is None and "\x1b" not in shown.find("body").get_attribute("textContent")
    assert "</script>\\x1b[31m" in shown.find("#completion").text and "↵" in shown.find("#completion").text
    assert "most frequent answer" in shown.find(".note").text
    assert shown.run("return document.querySelectorAll('#completion script, #fork script').length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_narrow_and_wide_light_and_dark(tmp_path, browser, report, width, dark):
    shown = opened(browser, write_forks(report, tmp_path / "forks.html"), width=width, dark=dark)
    shown.run("document.querySelectorAll('.branch').forEach(b => b.open = true)")
    assert shown.run("return document.documentElement.scrollWidth") <= width
    assert (tmp_path / "forks.html").stat().st_size < 2_500_000


def test_unknown_values_say_so(tmp_path, browser, report):
    nothing = {"value": None, "low": None, "high": None}
    for f in report["forks"]:
        f.update(value=nothing, spread=None)
        for b in f["branches"]:
            b.update(value=nothing, gain=nothing)
            for e in b["examples"]:
                e["right"] = None
    path = write_forks(report | {"measure": "unknown", "right": None, "start": nothing}, tmp_path / "forks.html")
    shown = opened(browser, path)
    assert "unknown" in shown.find(".branch summary").text and shown.errors() == []
    assert "NaN" not in shown.find("main").text


def test_the_value_curve_goes_through_every_fork_to_the_outcome(report):
    band, line = value_chart(report)["data"]
    assert line["x"] == [0, 1, 2, 2, 3, 6] and line["y"] == [0.5, 0.5, 0.55, 0.6, 0.1, 0.0]
    assert len(band["x"]) == len(band["y"]) == 12
    report["forks"][0]["branches"] = [
        {**b, "text": "<b>x" if b["taken"] else ""} for b in report["forks"][0]["branches"]
    ]
    drawn = str(value_chart(report))
    assert "<script" not in drawn and "<b>x" not in drawn and "&lt;b>x" in drawn  # Plotly reads HTML in its texts


def test_what_cannot_be_seen_is_shown():
    assert visible("a\tb\nc\x1b\u202e") == "a⇥b↵c\\x1b\\u202e" and visible("a\nb", lines=True) == "a↵\nb"
    assert word(" a") == "␣a" and word("") == "(empty)" and word("\n") == "↵"
    assert short("a" * 9, 10) == "a" * 9 and short("a" * 9 + "\nb", 6) == "aaa […] a↵b"
