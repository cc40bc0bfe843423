// How a token looks: its text with everything invisible made visible, and the colour of a value in both themes.
"use strict";
const paint = {
  // From nothing to the strongest. The page's text colour is readable on every one (a test counts the contrast), and no two ramps that
  // stand for a sign differ by red and green alone.
  ramps: {
    light: {heat: ["#ffffff", "#fdebc8", "#f9c377", "#e8893a"], rank: ["#ffffff", "#e4d9f3", "#b293da"], plus: ["#ffffff", "#c4defa", "#62a4e3"], minus: ["#ffffff", "#f8cdbd", "#e9805f"]},
    dark: {heat: ["#12161c", "#473014", "#784a0d", "#9c5200"], rank: ["#12161c", "#35264d", "#6a3fa0"], plus: ["#12161c", "#17375c", "#1d5fa8"], minus: ["#12161c", "#50261b", "#a13d1e"]},
  },
  // What each colouring says. of: the value of token i in a row of a block; ramp: its name, or "sign" for plus and minus.
  colours: {
    entropy: {name: "entropy", of: (row, i) => row.h?.[i], ramp: "heat", log: true, unit: "nats", see: "Strong: the policy was undecided here. Point at it for what else it might have said."},
    surprise: {name: "surprise (\u2212logp)", of: (row, i) => row.lp?.[i] == null ? null : -row.lp[i], ramp: "heat", log: true, unit: "nats", see: "Strong: an unlikely token was drawn."},
    rank: {name: "rank of the token", of: (row, i) => row.r?.[i], ramp: "rank", unit: "", see: "Plain: the most likely token (rank 1). Stronger: one further down the list."},
    kept: {name: "kept or dropped", of: (row, i) => row.k?.[i], ramp: "plus", unit: "", see: "Blue: its gradient counts. Grey and dotted: a method drops it."},
    weight: {name: "weight", of: (row, i) => each(row.w, i), ramp: "sign", centre: 1, unit: "", see: "Blue: counts for more than 1. Orange: for less."},
    shaped: {name: "advantage \u00d7 weight", of: (row, i) => each(row.s, i), ramp: "sign", centre: 0, unit: "", see: "Blue: pushed up. Orange: pushed down. Plain: not at all."},
    change: {name: "change of logp", of: (row, i) => row.d?.[i], ramp: "sign", centre: 0, unit: "nats", see: "Since the rollout, by the step that trained on it. Blue: more likely now. Orange: less."},
  },
  least: 0.001,  // nats where a log scale begins
  // A value between -1 and 1, of which 1 is the strongest colour.
  place(colour, value, scales, log) {
    const how = this.colours[colour], most = scales[colour];
    const within = x => Math.max(-1, Math.min(1, x));
    if (how.ramp === "sign") return within((value - how.centre) / most);
    if (colour === "kept") return value ? 0.6 : 0;
    if (colour === "rank") return within(Math.log(Math.max(value, 1)) / Math.log(most));
    if (log && how.log) return Math.max(0, within(Math.log(Math.max(value, 1e-9) / this.least) / Math.log(Math.max(most, 2 * this.least) / this.least)));
    return within(value / most);
  },
  // The colour for that place, as "#rrggbb".
  at(colour, x, theme = entrl.dark() ? "dark" : "light") {
    const how = this.colours[colour], ramps = this.ramps[theme];
    const stops = how.ramp === "sign" ? (x < 0 ? ramps.minus : ramps.plus) : ramps[how.ramp];
    const along = Math.abs(x) * (stops.length - 1), from = Math.min(Math.floor(along), stops.length - 2);
    const mixed = [1, 3, 5].map(k => {
      const [a, b] = [stops[from], stops[from + 1]].map(stop => parseInt(stop.slice(k, k + 2), 16));
      return Math.round(a + (b - a) * (along - from)).toString(16).padStart(2, "0");
    });
    return "#" + mixed.join("");
  },
  // Text with what cannot be seen made visible; strict: plain spaces too.
  visible(text, strict) {
    if (text === "") return "\u2205";
    const blank = /^ +$/.test(text);
    let out = "", marks = 0;
    for (const c of text) {
      const code = c.codePointAt(0), mark = /\p{M}/u.test(c);
      marks = mark ? marks + 1 : 0;
      if (mark && out === "") out = "\u25cc";  // a letter for it to sit on
      if (c === "\n") out += strict ? "\u21b5" : "\u21b5\n";
      else if (c === "\t") out += "\u21e5";
      else if (c === " " && (strict || blank)) out += "\u00b7";
      else if (code < 32) out += String.fromCharCode(0x2400 + code);
      else if (code === 127) out += "\u2421";
      else if (c === "\u00a0" || /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}\p{Cs}]/u.test(c)) out += "\u27e8U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
      else if (marks <= 3) out += c;
      else if (marks === 4) out += "\u2026";
    }
    return out;
  },
  number(value, digits = 3) {
    if (value == null) return "unknown";
    if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(0).replace("-", "\u2212").replace("e-", "e\u2212");
    return String(Number(value.toPrecision(digits))).replace("-", "\u2212");
  },
  percent(tenthousandths) {
    if (tenthousandths <= 0) return "< 0.01 %";
    if (tenthousandths >= 10000) return "> 99.99 %";
    return (tenthousandths / 100).toFixed(2) + " %";
  },
};
// A column that is one number for all tokens, or one each.
function each(column, i) { return Array.isArray(column) ? column[i] : column; }
