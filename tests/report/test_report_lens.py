"""The token lens of recorded runs: what fits is kept and the rest named, odd text stays text, hands and eyes find every number."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from rl.errors import ReportError
from rl.report import lens
from rl.report.lens import Side, labelled, lens_of_run, write_lens
from rl.report.lens_data import Plan, block, fitting, plans, scales

WORDS = ["so", " we", " add", " 17", " and", " 23", ".\n"]


def completion(texts, prompt="What is 17 + 23?", step=0, alternatives=True, trained=True, **more):
    """A row as the recorder writes it; the entropy of token i is (i % 7) / 4 nats, less at later steps."""
    n = len(texts)
    entropy = [(i % 7) / 4 * 0.9 ** (step / 10) for i in range(n)]
    row = {"prompt": prompt, "completion": "".join(texts), "reward": 1.0, "token_ids": [10 + i % 90 for i in range(n)]}
    row |= {
        "tokens": list(texts),
        "entropy": entropy,
        "logp": [-h for h in entropy],
        "rank": [1 + i % 3 for i in range(n)],
    }
    if trained:
        row |= {
            "group": 0,
            "reward/correct": 1.0,
            "advantage": 0.5,
            "kept": [h > 1 for h in entropy],
            "weight": [1.0] * n,
        }
        row |= {"shaped": [0.5 * (h > 1) for h in entropy], "old_logp": [-h for h in entropy]}
        row |= {"logp_after": [-h + 0.001 for h in entropy]}
    if alternatives:
        row |= {
            "top_ids": [[10 + i % 90, 1, 2, 3, 4] for i in range(n)],
            "top_tokens": [[t, "<b>", "\n", "é", ""] for t in texts],
        }
        row |= {"top_probs": [[0.5, 0.25, 0.125, 0.0625, 0.00001]] * n}
    return row | more


def probes(step, prompts=("first", "second")):
    rows = [
        completion(WORDS, prompt, step, trained=False, kind=kind, problem=i, reward=float(kind == "fresh"))
        for i, prompt in enumerate(prompts)
        for kind in ("fixed", "fresh")
    ]
    return pd.DataFrame(rows)


def rollouts(step, prompts, texts=WORDS, each=3, **more):
    return pd.DataFrame([completion(texts, p, step, reward=k / 2, **more) for p in prompts for k in range(each)])


def side(name="a", **views):
    return Side(name, "about " + name, views)


@pytest.fixture
def opened(tmp_path, browser):
    """``opened(*sides)`` writes their page and opens it; afterwards nothing may have been complained of or asked for."""
    pages = []

    def open_(*sides, **how):
        write_lens(sides, tmp_path / "lens.html")
        page = browser(tmp_path / "lens.html", **how)
        page.wait("document.body.dataset.ready === 'lens'")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        assert page.errors() == [] and page.requests() == []


def dock(page):
    return page.find("#dock").text


def shown(page, words):
    page.wait(f"document.body.dataset.shown.startsWith({json.dumps(words)})")


# -- what is kept --------------------------------------------------------------------------------------------------------------------


def test_plans_go_from_everything_to_little_and_never_grow():
    made = [(p.steps, p.prompts, p.each, p.tokens) for p in plans(Plan(30, 8, 8, 100))]
    assert made[0] == (30, 8, 8, 100) and made[-1] == (2, 1, 2, 1)
    assert all(all(a >= b for a, b in zip(before, after, strict=True)) for before, after in pairwise(made))


def test_what_fits_keeps_the_first_and_last_step_and_the_best_and_worst_completion():
    frames = {step: rollouts(step, [f"p{i}" for i in range(8)], WORDS * 20, each=6) for step in range(10, 210, 10)}
    _, plan, kept, spent = fitting([frames], 12_000)
    assert 0 < spent <= 12_000 and plan.steps < 20
    assert min(kept[0]) == 10 and max(kept[0]) == 200
    for frame in kept[0].values():
        assert {0.0, 2.5} <= set(frame["reward"]) and list(frame["reward"]) == sorted(frame["reward"], reverse=True)
    full, generous, everything, _ = fitting([frames], 10**9)
    assert generous == full == Plan(20, 8, 6, 140) and len(everything[0][10]) == 48


def test_two_sides_keep_the_prompts_that_both_have():
    sides = [{1: rollouts(1, ["a", "b", "c"])}, {1: rollouts(1, ["x", "c"])}]
    _, plan, kept, _ = fitting(sides, 900)
    assert plan.prompts == 1 and [set(side[1]["prompt"]) for side in kept] == [{"c"}, {"c"}]


def test_a_page_too_large_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lens, "BUDGET", 4_000)
    frames = {step: rollouts(step, ["a", "b"], WORDS * 50) for step in range(1, 30)}
    said = write_lens([side(rollouts=frames)], tmp_path / "lens.html")
    assert len(said) == 1 and "of 29 steps" in said[0] and "of 2 prompts" in said[0]
    assert said[0] in (tmp_path / "lens.html").read_text()
    monkeypatch.setattr(lens, "BUDGET", 4_500_000)
    assert write_lens([side(rollouts=frames)], tmp_path / "lens.html") == []


def test_a_change_smaller_than_the_rounding_of_logp_survives():
    frame = pd.DataFrame([completion(["a"], old_logp=[-123.456789], logp_after=[-123.456711])])
    row = block(frame, {"What is 17 + 23?": 0}, 9)["rows"][0]
    assert row["d"] == [pytest.approx(7.8e-5)] and row["op"] == [-123.5]


def test_special_tokens_are_those_that_the_text_leaves_out():
    frame = pd.DataFrame([completion(["<b>", " x", "<|im_end|>"], completion="<b> x")])
    made = block(frame, {"What is 17 + 23?": 0}, 9)
    assert [made["texts"][i] for i in made["special"]] == ["<|im_end|>"]


def test_scales_are_those_of_all_steps_and_bear_gaps():
    frames = {1: rollouts(1, ["a"]), 2: rollouts(2, ["a"], logp_after=[float("nan")] * 7)}
    found = scales([frames, {}])
    assert found["entropy"] == pytest.approx(1.49, abs=0.02) and found["change"] == pytest.approx(0.001)
    assert found["rank"] == 10 and found["weight"] == 1 and scales([{}])["shaped"] == 1


def test_labels_leave_out_what_all_prompts_begin_with():
    start = "system: Please reason step by step. user: "
    both = [start + "Add 1 and 2.", start + "Add 1 and 3."]
    assert list(labelled(both).values()) == ["2.", "3."]
    assert labelled(["x" * 300])["x" * 300].endswith("…")


# -- run folders ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model: {name: tiny}\ndata: {name: countdown}\nplugin: {}\nrecord: {every: 20}\n"
    )
    (folder / "manifest.json").write_text('{"format": 2, "seed": 3}')
    return folder


def test_a_run_folder_is_read_and_what_cannot_be_is_named(run_folder):
    frame = rollouts(20, ["a"]).assign(step=20)
    frame.to_parquet(run_folder / "rollouts" / "step_000020.parquet")
    frame.to_parquet(run_folder / "rollouts" / "step_000020.rank1.parquet")
    (run_folder / "rollouts" / "step_000040.parquet").write_text("torn")
    found = lens_of_run(run_folder)
    assert found.name == "run" and found.about == "tiny, countdown, plain GRPO, seed 3"
    assert list(found.views) == ["rollouts"] and len(found.views["rollouts"][20]) == 6
    assert len(found.broken) == 1 and "step 40" in found.broken[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("record: {every: 0}\n", "record.every=0"),
        ("record: {every: 20}\n", "before its first step"),
        ("{}\n", "resume"),
    ],
)
def test_a_run_without_rollouts_says_why_and_what_to_do(run_folder, config, says):
    (run_folder / "config.yaml").write_text(config)
    with pytest.raises(ReportError, match=says):
        lens_of_run(run_folder)


def test_a_finished_run_without_its_recordings_is_not_told_to_go_on(run_folder):
    (run_folder / "DONE").write_text("\n")
    with pytest.raises(ReportError, match="any more. Restore them"):
        lens_of_run(run_folder)


def test_a_run_of_which_nothing_can_be_read(run_folder):
    (run_folder / "rollouts" / "step_000040.parquet").write_text("torn")
    with pytest.raises(ReportError, match="step 40 cannot be read"):
        lens_of_run(run_folder)


# -- the page ------------------------------------------------------------------------------------------------------------------------


def test_pointing_and_tabbing_show_alternatives_and_numbers(opened):
    page = opened(side(rollouts={20: rollouts(20, ["a"])}))
    ActionChains(page.driver).move_to_element(page.driver.find_elements("css selector", ".t")[2]).perform()
    said = dock(page)
    assert "·add" in said and "token 3 of 7" in said and "50.00 %" in said and "< 0.01 %" in said
    assert page.run("return document.querySelectorAll('#token-top .choice').length") == 5
    assert page.run("return document.querySelector('.choice.drawn .mono').textContent") == "·add"
    for fact in (
        "entropy\n",
        "nats",
        "rank\n3",
        "kept\nno, dropped",
        "weight\n1",
        "change of logp\n0.001 nats",
    ):
        assert fact in said, fact
    page.find("#prompt summary").click()
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert "token 1 of 7" in dock(page) and page.run("return document.activeElement.className").startswith("t ")


def test_numbers_near_nothing_have_no_more_digits_than_were_kept(opened):
    frame = probes(0, ["p"])
    frame["entropy"] = [[8.7e-5] * len(WORDS)] * len(frame)
    frame["logp"] = [[-5.5e-6] * len(WORDS)] * len(frame)
    page = opened(side(probes={0: frame}))
    page.find(".t").click()
    told = " ".join(dock(page).split())
    assert "entropy 9e\u22125 nats" in told and "logp \u22121e\u22125 nats" in told and "probability > 99.99 %" in told


def test_keys_move_jump_between_forks_and_pin(opened):
    page = opened(side(rollouts={20: rollouts(20, ["a"], WORDS * 3)}))
    page.run("focusToken(cards[0], 0)")
    press = lambda *keys: ActionChains(page.driver).send_keys(*keys).perform()  # noqa: E731
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "token 3 of 21" in dock(page)
    press("n")
    assert "token 6 of 21" in dock(page)  # entropies grow over seven tokens: the highest fifth are the last two
    press("n", "n", "p")
    assert "token 7 of 21" in dock(page)
    press(Keys.END)
    assert "token 21 of 21" in dock(page)
    press(Keys.ENTER)
    ActionChains(page.driver).move_to_element(page.driver.find_elements("css selector", ".t")[1]).perform()
    assert "token 21 of 21" in dock(page) and "pinned" in dock(page)
    page.driver.find_elements("css selector", ".t")[4].click()
    assert "token 5 of 21" in dock(page) and "pinned" in dock(page)
    press(Keys.ESCAPE)
    assert "pinned" not in dock(page)


def test_the_slider_shows_the_same_token_at_another_step(opened):
    page = opened(side(probes={s: probes(s) for s in (0, 10, 20)}, rollouts={20: rollouts(20, ["a"])}))
    assert page.find("#prompts .mean").text == "1.00"  # of the fresh completion; the fixed one has 0
    page.run("focusToken(cards[0], 6)")
    assert "entropy\n1.5 nats" in dock(page) and "fixed" in page.find("#sides").text
    before = page.run("return document.querySelectorAll('.t')[6].style.background")
    page.find("#step").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    shown(page, "probes 20 0")
    assert "entropy\n1.215 nats" in dock(page) and "token 7 of 7" in dock(page)
    assert page.run("return document.querySelectorAll('.t')[6].style.background") != before
    assert page.find("#step-now").text == "20"
    page.find("#step").send_keys(Keys.HOME)
    page.find("#play").click()
    shown(page, "probes 20 0")
    page.wait("document.getElementById('play').getAttribute('aria-pressed') === 'false'")
    page.run("[...document.querySelectorAll('#views button')][1].click()")
    shown(page, "rollouts 20")
    assert "advantage +0.5" in page.find("#sides").text


def test_colourings_that_were_not_recorded_say_why(opened):
    old = rollouts(20, ["a"], alternatives=False).drop(columns=["rank", "old_logp", "logp_after"])
    page = opened(side(probes={0: probes(0)}, rollouts={20: old}))
    options = "return Object.fromEntries([...document.getElementById('colour').options].map(o => [o.value, [o.disabled, o.text]]))"
    found = page.run(options)
    assert found["kept"][0] and "trained on" in found["kept"][1] and not found["rank"][0]
    page.run("chooseView('rollouts')")
    shown(page, "rollouts 20")
    found = page.run(options)
    assert not found["kept"][0] and found["change"][0] and "older entrl" in found["rank"][1]
    page.run("focusToken(cards[0], 1)")
    assert "Alternatives are not here: recorded by an older entrl" in dock(page)


@pytest.mark.parametrize("colour", ["surprise", "rank", "kept", "weight", "shaped", "change"])
def test_each_colouring_colours_and_explains_itself(opened, colour):
    weights = {"weight": [0.5, 1.5, 1, 1, 1, 1, 1]}
    page = opened(side(rollouts={20: rollouts(20, ["a"], **weights)}))
    page.run(f"const c = document.getElementById('colour'); c.value = '{colour}'; c.dispatchEvent(new Event('change'))")
    shown(page, f"rollouts 20 0 {colour}")
    colours = page.run("return [...cards[0].body.querySelectorAll('.t')].map(t => t.style.background)")
    assert len(set(colours)) > 1 or colour == "change"  # which is the same for all tokens here
    assert any(colours) and page.find("#look-for").text
    assert bool(page.run("return document.querySelectorAll('.dropped').length")) == (colour == "kept")


def test_two_sides_show_the_same_prompt_and_say_where_there_is_none(opened):
    a = side("left", rollouts={20: rollouts(20, ["both", "mine"])})
    b = side("right", rollouts={20: rollouts(20, ["other", "both"])})
    page = opened(a, b)
    texts = lambda: [s.text for s in page.driver.find_elements("css selector", ".side")]  # noqa: E731
    assert all("reward 1" in text for text in texts()) and "left" in texts()[0] and "right" in texts()[1]
    lefts = page.run("return [...document.querySelectorAll('.side')].map(s => s.getBoundingClientRect().left)")
    assert lefts[1] > lefts[0] + 300
    labels = page.run("return [...document.querySelectorAll('#prompts .label')].map(l => l.textContent)")
    assert labels[0] == "both" and set(labels) == {"both", "mine", "other"}
    page.run("[...document.querySelectorAll('#prompts button')].find(b => b.textContent.includes('mine')).click()")
    page.wait("document.querySelectorAll('.side')[1].textContent.includes('Nothing of this prompt')")
    page.run("document.querySelector('#prompts [aria-current]').focus()")
    ActionChains(page.driver).send_keys(Keys.ARROW_UP).perform()
    page.wait("!document.getElementById('sides').textContent.includes('Nothing of this prompt')")


def test_a_run_without_probes_beside_one_with_them(opened):
    old = side("old", rollouts={20: rollouts(20, ["both"])})
    new = side("new", probes={0: probes(0)}, rollouts={20: rollouts(20, ["both"])})
    page = opened(new, old)
    shown(page, "rollouts 20")  # what both have comes first
    page.run("[...document.querySelectorAll('#views button')].find(b => b.value === 'probes').click()")
    page.wait("document.querySelectorAll('.side')[1].textContent.includes('No probes were recorded here')")


def test_the_slider_can_stay_with_a_prompt(opened):
    frames = {s: rollouts(s, ["again", "else"] if s in (20, 60) else [f"p{s}"]) for s in (20, 40, 60)}
    page = opened(side(rollouts=frames))
    shown(page, "rollouts 60")
    page.find("#stay").click()
    page.find("#step").send_keys(Keys.ARROW_LEFT)
    shown(page, "rollouts 20 0")
    assert page.find("#prompt-text").text == "again"


EVIL = [
    "<script>window.broken = 1</script>",
    "\n",
    "\t",
    " ",
    "\x00\x1b",
    "\u202eabc",
    "שלום",
    "\u0301" * 40,
    "",
    "�",
    "👩‍🚀",
    "W" * 400,
]


def test_odd_text_stays_text_and_is_visible(opened):
    row = completion(EVIL, prompt="<img src=x onerror='window.broken = 1'>\u202e", completion="")
    page = opened(side("<b>bold</b>", rollouts={1: pd.DataFrame([row])}))
    texts = page.run("return [...document.querySelectorAll('.t')].map(t => t.textContent)")
    assert texts[0] == EVIL[0] and page.run("return window.broken") is None
    assert texts[1:6] == ["↵\n", "⇥", "·", "␀␛", "⟨U+202E⟩abc"]
    assert texts[6] == "שלום" and texts[7] == "◌" + "\u0301" * 3 + "…" and texts[8] == "∅" and texts[9] == "�"
    assert "⟨U+202E⟩" in page.find("#prompt-text").text and "<b>bold</b>" in page.find("h1").text
    for i in range(len(EVIL)):
        page.run(f"focusToken(cards[0], {i})")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.run("focusToken(cards[0], 6)")  # no jump either: the dock stays where it is
    assert (
        page.run("return Math.round(document.getElementById('dock').getBoundingClientRect().bottom - innerHeight)") == 0
    )


def test_a_long_completion_is_made_as_it_is_read(opened):
    page = opened(side(rollouts={20: rollouts(20, ["a"], WORDS * 1500, each=2, alternatives=False)}))
    made = "return document.querySelectorAll('.t').length"
    assert 300 < page.run(made) < 6000
    page.run("focusToken(cards[1], 10499)")
    assert "token 10500 of 10500" in dock(page)
    box = page.run("const b = document.activeElement.getBoundingClientRect(); return [b.top, b.bottom]")
    assert 0 < box[0] < box[1] < page.run("return document.getElementById('dock').getBoundingClientRect().top")
    height = page.run("return document.body.scrollHeight")
    for part in range(1, 6):
        page.run(f"window.scrollTo(0, {height * part // 6})")
        page.wait(
            "[...document.querySelectorAll('.chunk')].every(c => { const b = c.getBoundingClientRect(); return c.firstChild || b.bottom < 0 || b.top > innerHeight; })"
        )


def test_it_fits_a_narrow_screen(opened):
    page = opened(
        side("left", probes={s: probes(s) for s in (0, 10)}), side("right", probes={s: probes(s) for s in (0, 10)})
    )
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.wait("innerWidth === 400")
        page.run("focusToken(cards[0], 2)")
        assert page.run("return document.documentElement.scrollWidth") <= 400
        tops = page.run("return [...document.querySelectorAll('.side')].map(s => s.getBoundingClientRect().top)")
        assert tops[1] > tops[0] + 100
        assert page.run("return document.getElementById('dock').scrollWidth <= 400")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_colour(opened, dark):
    page = opened(side(rollouts={20: rollouts(20, ["a"])}), dark=dark)
    found = page.run(
        "return {fg: entrl.colour('fg'), bg: entrl.colour('bg'), muted: entrl.colour('muted'), all: Object.keys(paint.colours).map(c => "
        "Array.from({length: 41}, (_, k) => paint.at(c, k / 20 - 1)))}"
    )
    worst = min(contrast(found["fg"], colour) for colours in found["all"] for colour in colours)
    assert worst >= 4.5 and contrast(found["muted"], found["bg"]) >= 4.5


def contrast(a, b):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour):
        parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
