// What every page has: its data, unpacked, and the choice of light or dark.
"use strict";
const entrl = {
  async unpack(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  },
  async data(name) { return JSON.parse(await entrl.unpack("data-" + name)); },
  colour(name) { return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(); },
  dark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  // A page of its own may want to draw anew when the theme changes: entrl.themed.push(function).
  themed: [],
  element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in made && typeof value !== "string") made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children);  // text stays text, whatever is in it
    return made;
  },
};
document.getElementById("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = entrl.dark() ? "light" : "dark";
  entrl.themed.forEach(draw => draw());
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => entrl.themed.forEach(draw => draw()));
