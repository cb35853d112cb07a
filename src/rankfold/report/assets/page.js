"use strict";
const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
const rows = parsed("rows");
const specifications = parsed("figures");

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
  [(row) => percent(row.share), "right"], [(row) => percent(row.measured), "right"], [(row) => row.why],
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

// The figures, in the colours of the page; drawn again where the reader's scheme changes.
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const config = {
    background: "transparent",
    view: { stroke: null },
    font: "system-ui, sans-serif",
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 500 },
    legend: { labelColor: ink, titleColor: ink, orient: "top" },
    text: { color: ink },
    mark: { tooltip: true },
  };
  for (const place of document.querySelectorAll(".figure")) {
    const specification = specifications[place.id];
    if (!specification) {
      place.textContent = "These files have no numbers for this figure.";
      place.classList.add("empty");
      continue;
    }
    vegaEmbed(place, { ...specification, config }, { actions: false, renderer: "svg", tooltip: { theme: dark.matches ? "dark" : "light" } })
      .then(() => place.setAttribute("data-drawn", ""))
      .catch((error) => { place.textContent = `This figure can't be drawn: ${error.message}`; console.error(error); });
  }
}
dark.addEventListener("change", draw);
draw();
