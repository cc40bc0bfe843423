// Charts: <figure class="chart"><h3>..</h3><figcaption>..</figcaption><div class="plot" data-chart="name"></div></figure>, whose
// traces and layout are in the data called "charts": {name: {data: [...], layout: {...}}}. A colour "c1" to "c8" (or "fg", "muted", ...)
// in a trace is the theme's. A page's own script may change what is drawn, entrl.charts.prepare, and be told of each chart,
// entrl.charts.told, and when all are drawn: entrl.charts.drawn.push(function). For charts over the steps steps.js does.
"use strict";
entrl.charts = {
  prepare: figure => figure,
  told: plot => {},
  drawn: [],
  async start() {
    const script = document.createElement("script");
    script.textContent = await entrl.unpack("lib-plotly");
    document.head.append(script);
    this.figures = await entrl.data("charts");
    for (const plot of document.querySelectorAll("[data-chart]")) {
      this.drawOne(plot);
      this.told(plot);
      await new Promise(done => setTimeout(done));  // what is above can be read while the rest is drawn
    }
    this.drawn.forEach(tell => tell());
    entrl.themed.push(() => this.draw());
    document.body.dataset.ready = "charts";
  },
  draw() { document.querySelectorAll("[data-chart]").forEach(plot => this.drawOne(plot)); },
  drawOne(plot) {
    const figure = this.prepare(this.figures[plot.dataset.chart]);
    const traces = figure.data.map(trace => this.coloured(structuredClone(trace)));
    Plotly.react(plot, traces, this.layout(structuredClone(figure.layout || {})), {displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"]});
  },
  colour(text) {
    const [name, alpha] = text.split("/");  // "c1/0.2": a fifth of the colour
    const colour = entrl.colour(name);
    return !colour ? text : alpha ? colour + Math.round(255 * alpha).toString(16).padStart(2, "0") : colour;
  },
  coloured(node) {
    for (const [key, value] of Object.entries(node)) {
      if (key === "x" || key === "y" || key === "z") continue;
      if (typeof value === "string" && (key === "color" || key === "fillcolor")) node[key] = this.colour(value);
      else if (key === "colorscale" && Array.isArray(value)) node[key] = value.map(([at, colour]) => [at, this.colour(colour)]);
      else if (value && typeof value === "object") this.coloured(value);
    }
    return node;
  },
  layout(own) {
    const axis = {gridcolor: entrl.colour("line"), zerolinecolor: entrl.colour("line"), linecolor: entrl.colour("line"), automargin: true};
    const merged = {
      margin: {l: 48, r: 12, t: 8, b: 36}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x unified",
      font: {color: entrl.colour("fg"), size: 12, family: "system-ui, sans-serif"}, showlegend: true,
      legend: {orientation: "h", y: 1.12, x: 0, font: {size: 11}}, modebar: {bgcolor: "rgba(0,0,0,0)", color: entrl.colour("muted"), activecolor: entrl.colour("accent")},
      hoverlabel: {bgcolor: entrl.colour("panel"), font: {color: entrl.colour("fg")}},
      ...own,
    };
    for (const name of ["xaxis", "yaxis", ...Object.keys(own).filter(k => /^[xy]axis\d/.test(k))]) merged[name] = {...axis, ...(own[name] || {})};
    return this.coloured(merged);
  },
};
document.addEventListener("DOMContentLoaded", () => entrl.charts.start());  // when the page's own script has been read
