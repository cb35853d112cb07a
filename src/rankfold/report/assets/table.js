"use strict";
const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
const rows = parsed("rows");

// The table of layers: sorted by a heading, filtered by what is typed.
const table = document.getElementById("table");
const body = table.querySelector("tbody");
const filter = document.getElementById("filter");
const count = (value) => value.toLocaleString("en");
const percent = (value) => (value === null ? "" : `${(100 * value).toFixed(1)}%`);
const columns = [
  [(row) => row.place], [(row) => row.layer, "name"], [(row) => row.kind], [(row) => row.form],
  [(row) => (row.rank === null ? "" : `${row.rank} of ${row.full}`), "right"],
  [(row) => count(row.before), "right"], [(row) => count(row.after), "right"],
  [(row) => `${(100 * row.kept).toFixed(1)}%`, "right"],
  [(row) => percent(row.share), "right"],
  ...(rows.some((row) => row.measured !== null) ? [[(row) => percent(row.measured), "right"]] : []),
  [(row) => row.why],
];
let sorted = { key: "place", up: true };

function show() {
  const words = filter.value.toLowerCase();
  const seen = rows.filter((row) => `${row.layer} ${row.form} ${row.kind}`.toLowerCase().includes(words));
  const { key, up } = sorted;
  const order = (a, b) =>
    a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -1 : 1) * (up ? 1 : -1);
  seen.sort((a, b) => order(a[key], b[key]) || a.place - b.place);
  body.replaceChildren(...seen.map((row) => {
    const line = document.createElement("tr");
    for (const [text, kind] of columns) {
      const cell = document.createElement("td");
      cell.textContent = text(row);
      if (kind) cell.className = kind;
      line.append(cell);
    }
    return line;
  }));
  document.getElementById("shown").textContent = `${seen.length} of ${rows.length}`;
}

for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const { key } = button.dataset;
    sorted = { key, up: sorted.key === key ? !sorted.up : true };
    for (const heading of table.querySelectorAll("th")) heading.removeAttribute("aria-sort");
    button.parentElement.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
    show();
  });
}
filter.addEventListener("input", show);
show();
