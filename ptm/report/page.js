"use strict";
// Hover only: the page is complete without it. All text goes in as text, never as markup.
const tip = document.getElementById("tip");
function show(event, lines) {
  tip.replaceChildren();
  for (const line of lines) {
    const row = document.createElement("div");
    row.textContent = line;
    tip.append(row);
  }
  tip.style.display = "block";
  const left = event.pageX + 14, right = left + tip.offsetWidth;
  tip.style.left = (right > document.documentElement.clientWidth ? event.pageX - 14 - tip.offsetWidth : left) + "px";
  tip.style.top = event.pageY + 12 + "px";
}
function hide() { tip.style.display = "none"; }

for (const svg of document.querySelectorAll("svg[data-points]")) {
  const series = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = s => s.x.reduce((best, value, i) => Math.abs(value - x) < Math.abs(s.x[best] - x) ? i : best, 0);
    const found = series.map(s => [s, near(s)]);
    const [first, at] = found.reduce((a, b) => Math.abs(b[0].x[b[1]] - x) < Math.abs(a[0].x[a[1]] - x) ? b : a);
    cursor.setAttribute("x1", first.x[at]);
    cursor.setAttribute("x2", first.x[at]);
    show(event, found.map(([s, i]) => "step " + s.step[i].toLocaleString() + " · " + s.name + " " + s.text[i]));
  });
  svg.addEventListener("mouseleave", () => { hide(); cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); });
}

const names = JSON.parse(document.getElementById("heat-names")?.textContent ?? "{}");
for (const image of document.querySelectorAll(".layer img")) {
  const steps = JSON.parse(image.dataset.steps);
  let pixels = null;
  image.addEventListener("mousemove", event => {
    if (!pixels) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      pixels = canvas.getContext("2d", { willReadFrequently: true });
      pixels.drawImage(image, 0, 0);
    }
    const box = image.getBoundingClientRect();
    const column = Math.min(image.naturalWidth - 1, Math.floor((event.clientX - box.left) / box.width * image.naturalWidth));
    const expert = Math.min(image.naturalHeight - 1, Math.floor((event.clientY - box.top) / box.height * image.naturalHeight));
    const colour = pixels.getImageData(column, expert, 1, 1).data.slice(0, 3).join();
    const [first, last] = steps[column];
    const when = first === last ? "step " + first : "steps " + first + " to " + last;
    show(event, ["expert " + expert + " · " + (names[colour] ?? ""), when]);
  });
  image.addEventListener("mouseleave", hide);
}
