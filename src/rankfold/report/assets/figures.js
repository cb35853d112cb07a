"use strict";
// The figures, in the colours of the page; drawn again where the reader's scheme changes.
const specifications = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const config = {
    background: "transparent",
    aria: false, // a figure has its words in aria-label, and its marks none of their own
    view: { stroke: null },
    font: "system-ui, sans-serif",
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12, tickCount: 6, labelOverlap: true },
    legend: { labelColor: ink, titleColor: ink, orient: "top" },
    text: { color: ink },
    mark: { tooltip: true, aria: false },
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
