// Charts over the steps (class "steps"): a moving average over faint raw lines (#smoothing), one step marked in all of them by
// hovering or with the slider #step, its values in each chart's legend (.at), and a table in each details[data-numbers].
"use strict";
entrl.steps = {
  at: null,
  weight: 0,
  start() {
    this.slider = document.getElementById("step");
    const smoothing = document.getElementById("smoothing");
    if (smoothing) {
      const said = document.getElementById("smoothing-is");
      const read = () => { this.weight = Number(smoothing.value); said.textContent = this.weight.toFixed(2); };
      read();
      smoothing.addEventListener("input", read);
      smoothing.addEventListener("change", () => entrl.charts.draw());
    }
    entrl.charts.prepare = figure => ({...figure, data: figure.data.flatMap(trace => this.smoothed(trace))});
    entrl.charts.told = plot => { if (this.slider && plot.closest(".chart.steps")) this.legend(plot, Number(this.slider.value)); };
    entrl.charts.drawn.push(() => this.link());
    for (const box of document.querySelectorAll("details[data-numbers]")) {
      box.addEventListener("toggle", () => { if (box.open && box.children.length < 2) box.append(this.table(entrl.charts.figures[box.dataset.numbers])); });
    }
  },
  // As TensorBoard does: an exponential moving average that forgets its start.
  average(values) {
    let sum = 0, weight = 0;
    return values.map(value => {
      if (value === null) return null;
      sum = this.weight * sum + (1 - this.weight) * value;
      weight = this.weight * weight + 1 - this.weight;
      return Number((sum / weight).toPrecision(6));  // else a constant is one but for rounding, and its axis shows that
    });
  },
  smoothed(trace) {
    const kind = (trace.meta || {}).smooth;
    if (kind === "only") return [{...trace, y: this.average(trace.y), hoverinfo: "skip"}];
    if (!kind || !this.weight || trace.y.length < 3) return [trace];
    const raw = {...trace.line, color: trace.line.color + "/0.3", width: 1};
    return [
      {...trace, line: raw, marker: {...trace.marker, color: raw.color}},
      {...trace, mode: "lines", y: this.average(trace.y), hoverinfo: "skip"},
    ];
  },
  link() {
    this.plots = [...document.querySelectorAll(".chart.steps .plot")];
    for (const plot of this.plots) {
      plot.on("plotly_hover", event => this.mark(Math.round(event.points[0].x)));
      plot.on("plotly_afterplot", () => this.place(plot));
    }
    if (!this.slider) return;
    this.slider.addEventListener("input", () => this.mark(Number(this.slider.value)));
    this.mark(Number(this.slider.value));
  },
  mark(step) {
    if (step === this.at) return;
    this.at = step;
    this.slider.value = step;
    document.getElementById("step-is").textContent = step.toLocaleString("en");
    const said = [];
    for (const plot of this.plots) {
      this.place(plot);
      const values = this.legend(plot, step);
      if (plot.dataset.chart === "reward" || plot.dataset.chart === "entropy") said.push(...values.map(([trace, value]) => `${trace.name} ${value}`));
    }
    this.slider.setAttribute("aria-valuetext", `step ${step}: ${said.join("; ")}`);
  },
  // The values of a step above a chart, which are its legend.
  legend(plot, step) {
    const values = this.values(entrl.charts.figures[plot.dataset.chart], step);
    plot.closest(".chart").querySelector(".at").replaceChildren(...values.map(([trace, value]) => this.key(trace, value)));
    return values;
  },
  place(plot) {
    let line = plot.querySelector(".mark");
    if (!line) plot.append(line = entrl.element("div", {class: "mark"}));
    const {xaxis, yaxis} = plot._fullLayout, left = this.at === null ? -1 : xaxis.l2p(this.at);
    line.hidden = !(left >= 0 && left <= xaxis._length);
    Object.assign(line.style, {left: `${xaxis._offset + left}px`, top: `${yaxis._offset}px`, height: `${yaxis._length}px`});
  },
  values(figure, step) {
    const share = ((figure.layout.yaxis || {}).tickformat || "").endsWith("%");
    const shown = value => share && value !== null ? `${this.number(Number((100 * value).toPrecision(4)))}\u00a0%` : this.number(value);
    return figure.data.filter(trace => trace.type === "scatter" && trace.x.length).map(trace => [trace, shown(trace.y[this.nearest(trace.x, step)])]);
  },
  // The legend of a chart, with a value in it.
  key(trace, value) {
    const made = entrl.element("span", {class: "key"}, `${trace.name}\u00a0${value}`);
    const [name, alpha] = trace.line.color.split("/");
    made.style.setProperty("--key", alpha ? `color-mix(in srgb, var(--${name}) ${100 * alpha}%, transparent)` : `var(--${name})`);
    return made;
  },
  nearest(sorted, x) {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - sorted[low - 1] < sorted[low] - x ? low - 1 : low;
  },
  number(value) {
    if (value === null || value === undefined) return "\u2013";
    return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : Number(value.toPrecision(4)).toLocaleString("en", {maximumFractionDigits: 6});
  },
  some(items, n = 12) {
    if (items.length <= n) return items;
    return Array.from({length: n}, (_, i) => items[Math.round(i * (items.length - 1) / (n - 1))]);
  },
  table(figure) {
    const first = figure.data[0];
    if (first.type === "heatmap") return this.rows(...this.decades(first));
    if (first.customdata) {
      const points = this.some(first.x.map((x, i) => [first.customdata[i], x, first.y[i]]));
      return this.rows(["step", figure.layout.xaxis.title.text, figure.layout.yaxis.title.text], points);
    }
    const xs = this.some([...new Set(figure.data.flatMap(trace => trace.x))].sort((a, b) => a - b));
    const traces = figure.data.filter(trace => trace.x.length);
    return this.rows([figure.layout.xaxis.title.text, ...traces.map(trace => trace.name)], xs.map(x => [x, ...traces.map(trace => trace.y[this.nearest(trace.x, x)])]));
  },
  // The heat map in powers of ten: shares of the tokens.
  decades(trace) {
    const powers = trace.y.slice(0, -1).map(edge => Math.floor(Math.log10(edge * 1.01))), columns = this.some(trace.x.map((_, i) => i), 8);
    const rows = [...new Set(powers)].map(power => [`from ${Number(`1e${power}`)} nats`, ...columns.map(i => trace.z.reduce((sum, bin, j) => sum + (powers[j] === power ? bin[i] : 0), 0))]);
    return [["% of tokens", ...columns.map(i => `step ${trace.x[i]}`)], rows];
  },
  rows(head, rows) {
    const cell = (tag, value, i) => entrl.element(tag, i ? {class: "n"} : {}, typeof value === "number" || value === null ? this.number(value) : value);
    const line = (tag, values) => entrl.element("tr", {}, ...values.map((value, i) => cell(tag, value, i)));
    const table = entrl.element("table", {}, entrl.element("thead", {}, line("th", head)), entrl.element("tbody", {}, ...rows.map(row => line("td", row))));
    return entrl.element("div", {class: "scroll", tabindex: "0"}, table);
  },
};
entrl.steps.start();
