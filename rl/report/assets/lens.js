// The token lens. What is shown follows from `state`; `index` says what there is; blocks (a step of a side) are unpacked when first shown.
"use strict";
const CHUNK = 320;  // tokens that are laid out together; others are made when they come near the window
const by = id => document.getElementById(id);
const state = {view: null, step: 0, prompt: 0, colour: "entropy", at: null, pinned: false};  // at: {side, card, i}
const blocks = new Map();
let index, view, cards = [], drawing = 0, playing = null;

function block(side, step) {
  const name = `${state.view}-${side}-${step}`;
  if (!view.has[side][step]) return null;
  if (!blocks.has(name)) blocks.set(name, entrl.data(name));
  return blocks.get(name);
}
const steps = () => view.steps.filter(step => !by("stay").checked || has(step, state.prompt));
const recorded = (view, side) => Object.keys(view.has[side]).length > 0;
const has = (step, prompt) => view.has.some(side => side[step]?.[prompt]);
const log = () => by("log").checked && !!paint.colours[state.colour].log;

// -- what is chosen ---------------------------------------------------------------------------------------------------------------

function chooseView(name) {
  view = index.views.find(v => v.name === name);
  state.view = name;
  state.at = null;
  by("stay").checked = false;
  for (const button of by("views").children) button.setAttribute("aria-pressed", button.value === name);
  const options = Object.entries(paint.colours).map(([key, how]) => {
    const why = view.missing[key];
    return entrl.element("option", {value: key, disabled: !!why}, how.name + (why ? ` (not here: ${why})` : ""));
  });
  by("colour").replaceChildren(...options);
  if (view.missing[state.colour]) state.colour = "entropy";
  by("colour").value = state.colour;
  if (!view.steps.includes(state.step)) state.step = name === "rollouts" ? view.steps[view.steps.length - 1] : view.steps[0];
  showLegend();
  chooseStep(state.step);
}

function chooseStep(step) {
  state.step = step;
  if (!has(step, state.prompt)) state.prompt = promptsAt(step)[0];
  const often = view.steps.filter(s => has(s, state.prompt)).length;
  by("stay-label").hidden = often < 2 || often === view.steps.length;
  if (by("stay-label").hidden) by("stay").checked = false;
  const offered = steps();
  by("steps").hidden = view.steps.length < 2;
  by("step").max = offered.length - 1;
  by("step").value = offered.indexOf(step);
  by("step").setAttribute("aria-valuetext", `step ${step}`);
  by("step-now").textContent = step;
  showPrompts();
  return show();
}

// The prompts of a step, those that all sides have first.
function promptsAt(step) {
  const count = new Map();
  for (const side of view.has) for (const prompt of Object.keys(side[step] || {})) count.set(+prompt, (count.get(+prompt) || 0) + 1);
  return [...count.keys()].sort((a, b) => count.get(b) - count.get(a) || a - b);
}

function showPrompts() {
  const there = promptsAt(state.step);
  const focused = by("prompts").contains(document.activeElement);
  by("prompts-title").textContent = `${there.length} prompt${there.length === 1 ? "" : "s"}`;
  by("prompts").replaceChildren(...there.map(prompt => {
    const means = view.has.map(side => side[state.step]?.[prompt]?.[1]).map(mean => mean == null ? "\u2013" : mean.toFixed(2));
    const button = entrl.element("button", {type: "button", title: "mean reward of what was drawn" + (means.length > 1 ? ", left and right" : ""), tabIndex: prompt === state.prompt ? 0 : -1},
      entrl.element("span", {class: "label"}, paint.visible(index.prompts[prompt].label)), entrl.element("span", {class: "mean"}, means.join(" | ")));
    if (prompt === state.prompt) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => { state.prompt = prompt; state.at = null; chooseStep(state.step); });
    return entrl.element("li", {}, button);
  }));
  const current = by("prompts").querySelector("[aria-current]");
  if (focused) current.focus();
  const list = by("prompts"), top = current.offsetTop - list.offsetTop;
  if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 30) list.scrollTop = top - 40;
}

function showLegend() {
  const how = paint.colours[state.colour], most = view.scales[state.colour];
  by("log-label").hidden = !how.log;
  const low = how.ramp === "sign" ? -1 : 0, marks = Array.from({length: 13}, (_, k) => low + (1 - low) * k / 12);
  by("legend").style.background = `linear-gradient(90deg, ${marks.map(x => paint.at(state.colour, x)).join(",")})`;
  const kept = state.colour === "kept", end = value => paint.number(value) + (how.unit ? " " + how.unit : "");
  by("legend").hidden = kept;
  by("legend-low").textContent = kept ? "" : how.ramp === "sign" ? "\u2264 " + paint.number(how.centre - most) : state.colour === "rank" ? "1" : log() ? "\u2264 " + paint.least : "0";
  by("legend-high").textContent = kept ? "" : "\u2265 " + end(how.ramp === "sign" ? how.centre + most : most) + (log() || state.colour === "rank" ? ", logarithmic" : ", linear");
  by("look-for").textContent = how.see;
}

// -- completions ------------------------------------------------------------------------------------------------------------------

async function show() {
  const mine = ++drawing;
  const found = await Promise.all(index.sides.map((_, side) => block(side, state.step)));
  if (mine !== drawing) return;
  by("prompt-text").textContent = paint.visible(index.prompts[state.prompt].text);
  by("stage").style.minHeight = by("stage").offsetHeight + "px";  // the page does not jump while it is filled anew
  seen.disconnect();
  cards = [];
  by("sides").className = "sides" + (index.sides.length > 1 ? " two" : "");
  by("sides").replaceChildren(...found.map((data, side) => sideOf(data, side)));
  for (const card of cards) { drawStrip(card); card.chunks.forEach(chunk => seen.observe(chunk)); }
  by("stage").style.minHeight = "";
  melt();
  const again = state.at && cards.find(card => card.side === state.at.side && card.number === state.at.card);
  if (again && state.at.i < again.row.t.length) point(again, state.at.i); else { state.at = null; state.pinned = false; describe(null); }
  if (!document.body.dataset.ready) performance.mark("lens");  // tokens are on the screen: docs/lens.md says after how long
  document.body.dataset.ready = "lens";
  document.body.dataset.shown = `${state.view} ${state.step} ${state.prompt} ${state.colour}`;
}

function sideOf(data, side) {
  const box = entrl.element("div", {class: "side"});
  if (index.sides.length > 1) box.append(entrl.element("h2", {}, index.sides[side].name));
  const rows = data ? data.rows.filter(row => row.p === state.prompt) : [];
  if (!rows.length) box.append(entrl.element("p", {class: "muted"}, !recorded(view, side) ? `No ${view.name} were recorded here.` : `Nothing of this prompt here${view.steps.length > 1 ? " at step " + state.step : ""}.`));
  if (rows.some(row => row.kind === "fixed") && view.steps.length > 1) box.append(meltBox(side));
  rows.forEach((row, number) => box.append(cardOf(data, row, side, number)));
  return box;
}

function cardOf(data, row, side, number) {
  const words = row.t.length > 1 && !row.t.some(t => /\s/.test(data.texts[t]));  // a tokenizer of whole words: the spaces are not its
  const card = {data, row, side, number, chunks: [], starts: []};
  const facts = [];
  if (row.kind === "fixed") facts.push(entrl.element("b", {}, "fixed"), `drawn by the starting policy, scored at step ${state.step}`);
  if (row.kind === "fresh") facts.push(entrl.element("b", {}, "fresh"), `drawn at step ${state.step}`);
  if (row.reward != null) facts.push(entrl.element("b", {}, `reward ${paint.number(row.reward)}`));
  if (Object.keys(row.rewards).length > 1) for (const [name, value] of Object.entries(row.rewards)) facts.push(`${name} ${paint.number(value)}`);
  if (row.advantage != null) facts.push(`advantage ${row.advantage > 0 ? "+" : ""}${paint.number(row.advantage)}`);
  facts.push(`${row.n} tokens${row.n > row.t.length ? `, the first ${row.t.length} here` : ""}`);
  if (row.mean != null) facts.push(`mean entropy ${paint.number(row.mean)} nats`);
  card.strip = entrl.element("canvas", {class: "strip", title: "entropy along the completion; click to go there"});
  card.strip.setAttribute("aria-hidden", "true");
  card.strip.addEventListener("click", event => focusToken(card, Math.floor(event.offsetX / card.strip.clientWidth * row.t.length)));
  card.body = entrl.element("div", {class: "tokens" + (words ? " words" : ""), role: "group", "aria-label": `completion ${number + 1}, tokens`});
  for (let start = 0; start < row.t.length;) {
    let end = Math.min(start + CHUNK, row.t.length);
    for (let k = end; k > start + CHUNK / 2 && end < row.t.length; k--) if (data.texts[row.t[k - 1]].endsWith("\n")) { end = k; break; }  // a break is there anyway
    const chunk = entrl.element("div", {class: "chunk"});
    chunk.range = [card, start, end];
    chunk.style.containIntrinsicSize = `auto ${Math.ceil((end - start) / 14) * 26}px`;
    chunk.style.minHeight = `${Math.ceil((end - start) / 14) * 26}px`;
    card.chunks.push(chunk);
    card.starts.push(start);
    start = end;
  }
  if (!row.t.length) card.body.append(entrl.element("span", {class: "muted"}, "no trained token"));
  card.body.append(...card.chunks);
  if (card.chunks.length) fill(card.chunks[0]);
  cards.push(card);
  const head = entrl.element("header", {}, ...facts.map(fact => typeof fact === "string" ? entrl.element("span", {}, fact) : fact));
  return entrl.element("article", {class: "card"}, head, card.strip, card.body);
}

const seen = new IntersectionObserver(entries => entries.forEach(entry => { if (entry.isIntersecting) fill(entry.target); }), {rootMargin: "900px"});

function fill(chunk) {
  if (chunk.firstChild) return;
  const [card, start, end] = chunk.range, special = new Set(card.data.special);
  for (let i = start; i < end; i++) {
    const token = document.createElement("span");
    token.className = "t" + (special.has(card.row.t[i]) ? " special" : "");
    token.textContent = paint.visible(card.data.texts[card.row.t[i]]);
    token.tabIndex = i === 0 ? 0 : -1;
    token.place = [card, i];
    chunk.append(token);
    colourToken(token);
  }
  chunk.style.minHeight = "";
  seen.unobserve(chunk);
}

function colourToken(token) {
  const [card, i] = token.place, value = paint.colours[state.colour].of(card.row, i);
  const x = value == null ? 0 : paint.place(state.colour, value, view.scales, log());
  token.style.background = Math.abs(x) < 0.01 ? "" : paint.at(state.colour, x);
  token.classList.toggle("dropped", state.colour === "kept" && value === 0);
}

function recolour() {
  showLegend();
  document.querySelectorAll(".t").forEach(colourToken);
  cards.forEach(drawStrip);
  melt();
  document.body.dataset.shown = `${state.view} ${state.step} ${state.prompt} ${state.colour}`;
}

function canvas(of, height) {
  const ratio = window.devicePixelRatio || 1;
  of.width = Math.max(1, Math.round(of.clientWidth * ratio));
  of.height = Math.round(height * ratio);
  const pen = of.getContext("2d");
  pen.scale(ratio, ratio);
  return pen;
}

// Entropy along a completion, the highest of the tokens that share a pixel.
function drawStrip(card) {
  const pen = canvas(card.strip, 24), width = card.strip.clientWidth, n = card.row.t.length, wide = width / n;
  pen.fillStyle = entrl.colour("c2");
  for (let i = 0; i < n; i++) {
    const tall = 22 * paint.place("entropy", card.row.h[i] ?? 0, view.scales, false);
    pen.fillRect(i * wide, 24 - tall, Math.max(wide > 3 ? wide - 1 : wide, 0.8), tall);
  }
  if (state.at?.side === card.side && state.at.card === card.number) {
    pen.fillStyle = entrl.colour("fg");
    pen.fillRect(state.at.i * wide, 0, Math.max(2, Math.min(wide - 1, 4)), 24);
  }
}

// The fixed completion over all steps: a line a step, a column a token.
function meltBox(side) {
  const drawn = entrl.element("canvas", {class: "melt", title: "click to go to a step and token"});
  drawn.setAttribute("aria-hidden", "true");
  drawn.side = side;
  drawn.addEventListener("click", event => {
    const step = view.steps[Math.min(view.steps.length - 1, Math.floor(event.offsetY / drawn.clientHeight * view.steps.length))];
    const card = cards.find(c => c.side === side && c.row.kind === "fixed");
    state.at = {side, card: card.number, i: Math.floor(event.offsetX / drawn.clientWidth * card.row.t.length)};
    chooseStep(step);
  });
  return entrl.element("div", {class: "melting muted"}, `The fixed completion from step ${view.steps[0]} (top) to ${view.steps.at(-1)}: a line each step, a column each token. Watch columns fade.`, drawn);
}

async function melt() {
  const mine = drawing;
  for (const drawn of document.querySelectorAll("canvas.melt")) {
    const all = await Promise.all(view.steps.map(step => block(drawn.side, step)));
    if (mine !== drawing) return;
    const tall = Math.max(4, Math.min(10, 140 / view.steps.length)), height = tall * view.steps.length;
    drawn.style.height = height + "px";
    const pen = canvas(drawn, height), width = drawn.clientWidth;
    all.forEach((data, line) => {
      const row = data?.rows.find(r => r.p === state.prompt && r.kind === "fixed");
      if (!row) return;
      const wide = width / row.t.length, colour = view.missing[state.colour] ? "entropy" : state.colour;
      row.t.forEach((_, i) => {
        const value = paint.colours[colour].of(row, i);
        if (value == null) return;
        pen.fillStyle = paint.at(colour, paint.place(colour, value, view.scales, log()));
        pen.fillRect(i * wide, line * tall, wide > 3 ? wide - 1 : wide + 0.5, tall > 5 ? tall - 1 : tall);
      });
    });
    pen.strokeStyle = entrl.colour("accent");
    pen.lineWidth = 1.5;
    pen.strokeRect(0.75, view.steps.indexOf(state.step) * tall + 0.25, width - 1.5, tall - 0.5);
  }
}

// -- the token under the eye ------------------------------------------------------------------------------------------------------

function tokenOf(card, i) {
  const number = card.starts.findLastIndex(start => start <= i);
  fill(card.chunks[number]);
  return card.chunks[number].children[i - card.starts[number]];
}

function point(card, i) {
  const before = cards.find(c => c.side === state.at?.side && c.number === state.at?.card);
  document.querySelectorAll(".t.at, .t.pinned").forEach(old => old.classList.remove("at", "pinned"));
  state.at = {side: card.side, card: card.number, i};
  tokenOf(card, i).classList.add(state.pinned ? "pinned" : "at");
  if (before && before !== card) drawStrip(before);
  drawStrip(card);
  describe(card, i);
}

function focusToken(card, i) {
  const token = tokenOf(card, Math.max(0, Math.min(i, card.row.t.length - 1)));
  card.body.querySelectorAll('.t[tabindex="0"]').forEach(other => { other.tabIndex = -1; });
  token.tabIndex = 0;
  point(card, token.place[1]);
  token.focus({preventScroll: true});
  const box = token.getBoundingClientRect(), dock = by("dock").getBoundingClientRect().top;
  if (box.top < 110 || box.bottom > dock - 10) window.scrollBy({top: box.top - (dock + 110) / 2});
}

// The next token among the fifth of the completion with the highest entropy.
function nextFork(card, i, way) {
  const least = [...card.row.h].sort((a, b) => b - a)[Math.max(0, Math.ceil(card.row.h.length / 5) - 1)];
  for (let k = i + way; k >= 0 && k < card.row.h.length; k += way) if (card.row.h[k] >= least && card.row.h[k] > 0) return k;
  return i;
}

function describe(card, i) {
  if (!card) {
    by("token-text").textContent = "";
    by("token-where").textContent = "Point at a token, or press Tab to reach one.";
    by("token-top").replaceChildren();
    by("token-numbers").replaceChildren();
    return;
  }
  const {row, data} = card, t = row.t[i];
  by("token-text").textContent = paint.visible(data.texts[t], true);
  const special = data.special.includes(t) ? ", special" : "";
  by("token-where").textContent = `token ${i + 1} of ${row.n}, id ${data.ids[t]}${special}${state.pinned ? "; pinned (Escape)" : ""}`;
  by("token-top").replaceChildren(...choices(card, i));
  const facts = [["entropy", row.h?.[i], "nats"], ["probability", row.lp?.[i] == null ? null : paint.percent(Math.round(1e4 * Math.exp(row.lp[i]))), ""], ["logp", row.lp?.[i], "nats"], ["logp, rollout", row.op?.[i], "nats"],
    ["change of logp", row.d?.[i], "nats"], ["rank", row.r?.[i], ""], ["kept", row.k ? (row.k[i] ? "yes" : "no, dropped") : null, ""], ["weight", each(row.w, i), ""], ["advantage \u00d7 weight", each(row.s, i), ""]];
  by("token-numbers").replaceChildren(...facts.filter(([, value]) => value != null).flatMap(([name, value, unit]) =>
    [entrl.element("dt", {}, name), entrl.element("dd", {}, typeof value === "string" ? value : paint.number(value, 4) + (unit ? " " + unit : ""))]));
}

function choices({row, data}, i) {
  if (!row.ti) return [entrl.element("p", {class: "muted"}, `Alternatives are not here: ${view.missing.top || "this completion was recorded without"}.`)];
  const k = row.ti.length / row.t.length, line = (t, p, drawn) => entrl.element("div", {class: "choice" + (drawn ? " drawn" : "")},
    entrl.element("span", {class: "mono"}, paint.visible(data.texts[t], true)), entrl.element("span", {class: "line"}, entrl.element("i", {style: `width: ${Math.max(p / 100, 0.4)}%`})), entrl.element("span", {class: "p"}, paint.percent(p)));
  const top = Array.from({length: k}, (_, n) => [row.ti[i * k + n], row.tp[i * k + n]]);
  const lines = top.map(([t, p]) => line(t, p, data.ids[t] === data.ids[row.t[i]]));
  if (!lines.some(made => made.classList.contains("drawn"))) lines.push(line(row.t[i], Math.round(1e4 * Math.exp(row.op?.[i] ?? row.lp[i])), true));
  return lines;
}

// -- hands ------------------------------------------------------------------------------------------------------------------------

by("sides").addEventListener("mouseover", event => { const token = event.target.closest(".t"); if (token && !state.pinned) point(...token.place); });
by("sides").addEventListener("focusin", event => { const token = event.target.closest(".t"); if (token && !state.pinned) point(...token.place); });
by("sides").addEventListener("click", event => {
  const token = event.target.closest(".t");
  if (!token) return;
  const [card, i] = token.place, same = state.at?.side === card.side && state.at.card === card.number && state.at.i === i;
  state.pinned = !(state.pinned && same);
  focusToken(card, i);
});
by("sides").addEventListener("keydown", event => {
  const token = event.target.closest(".t");
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const [card, i] = token.place;
  const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: card.row.t.length - 1}[event.key] ?? {n: 1, p: -1}[event.key];
  if (event.key === "Enter" || event.key === "Escape") { state.pinned = event.key === "Enter" && !state.pinned; point(card, i); }
  else if (to === undefined) return;
  else focusToken(card, event.key === "n" || event.key === "p" ? nextFork(card, i, to) : to);
  event.preventDefault();
});
by("prompts").addEventListener("keydown", event => {
  const way = {ArrowDown: 1, ArrowUp: -1}[event.key], there = promptsAt(state.step);
  if (!way) return;
  event.preventDefault();
  const next = there[there.indexOf(state.prompt) + way];
  if (next !== undefined) { state.prompt = next; state.at = null; chooseStep(state.step); }
});
by("colour").addEventListener("change", () => { state.colour = by("colour").value; recolour(); });
by("log").addEventListener("change", recolour);
by("stay").addEventListener("change", () => chooseStep(state.step));
by("step").addEventListener("input", () => chooseStep(steps()[by("step").value]));
by("play").addEventListener("click", () => playing ? stop() : play());
function stop() { clearInterval(playing); playing = null; by("play").textContent = "\u25b6"; by("play").setAttribute("aria-pressed", "false"); }
function play() {
  by("play").textContent = "\u23f8";
  by("play").setAttribute("aria-pressed", "true");
  if (state.step === steps().at(-1)) chooseStep(steps()[0]);
  playing = setInterval(() => { const next = steps()[steps().indexOf(state.step) + 1]; if (next === undefined) stop(); else chooseStep(next); }, 800);
}
entrl.themed.push(recolour);
let resizing;
window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { cards.forEach(drawStrip); melt(); }, 120); });

entrl.data("index").then(found => {
  index = found;
  by("views").replaceChildren(...index.views.map(v => {
    const button = entrl.element("button", {type: "button", value: v.name, title: v.about}, v.name);
    button.addEventListener("click", () => chooseView(v.name));
    return button;
  }));
  chooseView((index.views.find(v => v.has.every((_, side) => recorded(v, side))) || index.views[0]).name);  // one that both sides have
});
