// The completion with its forks, and the branches of the one that is chosen.
"use strict";
(async () => {
  const {tokens, entropy, measure, forks} = await entrl.data("forks");
  const el = entrl.element;
  const two = (x, sign) => {
    if (x === null) return "unknown";
    const rounded = Math.round(100 * x) / 100 || 0;  // never -0.00
    return (rounded < 0 ? "−" : sign ? "+" : "") + Math.abs(rounded).toFixed(2);
  };
  const interval = (e, sign) => e.value === null ? "unknown" : `${two(e.value, sign)} (${two(e.low, sign)} to ${two(e.high, sign)})`;
  const most = Math.max(1, ...entropy);
  const byPlace = new Map(forks.map((fork, i) => [fork.place, i]));
  const buttons = [];

  const completion = document.getElementById("completion");
  tokens.forEach((token, i) => {
    const shade = `background: color-mix(in srgb, var(--c2) ${Math.round(60 * entropy[i] / most)}%, transparent)`;
    const title = `${entropy[i].toFixed(2)} nats`;
    const lead = token.trim() ? token.length - token.trimStart().length : 0;  // the space before a word is no part of its colour
    completion.append(token.slice(0, lead));
    if (!byPlace.has(i)) { completion.append(el("span", {class: "t", style: shade, title}, token.slice(lead))); return; }
    const number = byPlace.get(i);
    const button = el("button", {type: "button", style: shade, title, "aria-pressed": "false", "aria-label": `fork ${number + 1}, ${token.trim() || "space"}, ${title}`}, token.slice(lead), el("sup", {}, String(number + 1)));
    button.addEventListener("click", () => choose(number));
    buttons.push(button);
    completion.append(button);
  });
  completion.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? forks.length - 1 : by ? chosen + by : null;
    if (to === null || to < 0 || to >= forks.length) return;
    event.preventDefault();
    choose(to);
    buttons[to].focus();
  });

  // From 0 to 1: the interval as a line, the value as a dot, the value of the place as a tick across.
  function interval_bar(e, place) {
    const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
    svg.setAttribute("class", "ci");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `value ${interval(e)}, of the place ${two(place)}`);
    const add = (tag, attributes) => {
      const made = document.createElementNS(ns, tag);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      svg.append(made);
    };
    add("line", {x1: "0%", x2: "100%", y1: "50%", y2: "50%", stroke: "var(--line)", "stroke-width": 1});
    if (e.value === null) return svg;
    add("line", {x1: place * 100 + "%", x2: place * 100 + "%", y1: "0%", y2: "100%", stroke: "var(--muted)", "stroke-width": 1.5, "stroke-dasharray": "3 2"});
    add("line", {x1: e.low * 100 + "%", x2: e.high * 100 + "%", y1: "50%", y2: "50%", stroke: "var(--c1)", "stroke-width": 4, "stroke-linecap": "round", opacity: .45});
    add("circle", {cx: e.value * 100 + "%", cy: "50%", r: 4.5, fill: "var(--c1)"});
    return svg;
  }

  function percent(p) { return p >= 0.001 ? (100 * p).toFixed(1) + " %" : "< 0.1 %"; }

  function example(e) {
    const said = {true: measure === "majority" ? "this answer" : "right", false: measure === "majority" ? "another" : "wrong", null: "not graded"}[e.right];
    return el("li", {}, el("span", {class: e.right ? "up" : e.right === false ? "down" : "muted"}, (e.right ? "✓ " : e.right === false ? "✗ " : "") + said + (e.truncated ? ", truncated" : "")), el("pre", {}, e.text));
  }

  function branch(b, fork) {
    const bar = el("i", {}, el("b", {style: `width:${100 * b.prob}%`}));
    const sign = b.gain.low > 0 ? "up" : b.gain.high < 0 ? "down" : "muted";
    const counted = b.over ? "ends here" : measure === "unknown" ? `${b.n} drawn` : `${b.right} of ${b.n}`;
    const summary = el("summary", {},
      el("span", {class: "word"}, el("span", {class: "mono"}, b.text), b.taken ? el("span", {class: "taken"}, " taken") : ""),
      el("span", {class: "prob"}, bar, el("span", {}, percent(b.prob))),
      el("span", {class: "value"}, interval_bar(b.value, fork.value.value)),
      el("span", {class: "num"}, b.over ? `${two(b.value.value)}, ends here` : interval(b.value)),
      el("span", {class: "num " + sign}, interval(b.gain, true)));
    const answers = b.answers.filter(a => a[0] !== null).flatMap(a => [" ", el("code", {}, a[0]), ` (${a[1]})`]);
    const about = el("p", {class: "muted"}, `${counted}${b.truncated ? `; ${b.truncated} truncated` : ""}; ${b.distinct} different answer${b.distinct === 1 ? "" : "s"}`, ...(answers.length ? [", most often", ...answers] : []));
    return el("details", {class: "branch"}, summary, el("div", {class: "examples"}, about, el("ul", {}, ...b.examples.map(example))));
  }

  let chosen = -1;
  function choose(number) {
    chosen = number;
    buttons.forEach((button, i) => { button.setAttribute("aria-pressed", String(i === number)); button.tabIndex = i === number ? 0 : -1; });
    const fork = forks[number];
    const head = el("div", {class: "head", "aria-hidden": "true"}, ...["", "word", "probability", "value, 0 to 1; dashed: of the place", "value (95 %)", "gain (95 %)"].map(t => el("span", {}, t)));
    const taken = fork.branches.find(b => b.taken);
    document.getElementById("fork").replaceChildren(
      el("h2", {}, `Fork ${number + 1} of ${forks.length}: token ${fork.place}, ${fork.entropy.toFixed(2)} nats`),
      el("p", {}, `Value of the place ${interval(fork.value)}, spread ${two(fork.spread)}. The word taken was number ${fork.rank} by probability, and gained ${interval(taken.gain, true)}.`),
      el("p", {class: "muted"}, "Open a branch to read what came of it."),
      head, ...fork.branches.map(b => branch(b, fork)));
  }
  // the fork at which this completion lost or won most is the one to look at first
  const stake = fork => Math.abs(fork.branches.find(b => b.taken).gain.value || 0);
  if (forks.length) choose(forks.reduce((best, fork, i) => stake(fork) > stake(forks[best]) ? i : best, 0));
  document.body.dataset.forks = "ready";
})();
