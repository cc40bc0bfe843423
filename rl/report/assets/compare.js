// Methods shown or hidden in all charts and tables at once; tables sorted by a heading.
"use strict";
{
  const boxes = [...document.querySelectorAll("[data-method]")];

  function show() {
    const shown = new Set(boxes.filter(box => box.checked).map(box => box.dataset.method));
    for (const row of document.querySelectorAll("[data-methods]")) row.hidden = row.dataset.methods.split(" ").some(i => !shown.has(i));
    if (!entrl.charts.figures) return;
    for (const figure of Object.values(entrl.charts.figures)) {
      for (const trace of figure.data) if (trace.meta !== undefined) trace.visible = shown.has(String(trace.meta));
    }
    entrl.charts.draw();
  }
  boxes.forEach(box => box.addEventListener("change", show));
  // a box may have been clicked before the charts were drawn
  new MutationObserver(() => boxes.every(box => box.checked) || show()).observe(document.body, {attributeFilter: ["data-ready"]});
  for (const [id, checked] of [["all", true], ["none", false]]) {
    document.getElementById(id).addEventListener("click", () => { boxes.forEach(box => { box.checked = checked; }); show(); });
  }

  // What a cell is sorted by: its number where it has one, else its text.
  function key(cell) {
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = parseFloat(text.replace(/^</, ""));
    return text !== "" && !Number.isNaN(number) ? number : text;
  }

  function compared(a, b, up) {
    if (a === "" || b === "") return (a === "") - (b === "");  // empty comes last both ways
    return (up ? 1 : -1) * ascending(a, b);
  }

  function ascending(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, {numeric: true});
  }

  function sort(heading) {
    const table = heading.closest("table"), column = heading.cellIndex, body = table.tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].sort((a, b) => compared(key(a.cells[column]), key(b.cells[column]), up));
    body.append(...rows);
  }
  for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sort(button.closest("th")));
}
