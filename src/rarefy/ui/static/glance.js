// Every unit side by side: a small frontier and the sentence that matters, each a link to its section.
import { h, onWidth } from "./dom.js";
import { chart, enrolPoints, startState } from "./frontier.js";

function tile(unit, id, title) {
  const plot = h("div", { class: "mini", "aria-hidden": "true" });
  onWidth(plot, (width) => plot.replaceChildren(chart(unit, startState(unit), width, true)));
  return h("a", { class: "tile", href: "#" + id }, h("span", { class: "tile-name" }, title), plot,
    h("span", { class: "axes-of" }, `${unit.y.label} against ${unit.x.label}`), unit.headline && h("span", { class: "headline" }, unit.headline));
}

// tiles: [unit, id of its section, title]
export function glancePanel(tiles) {
  for (const [unit] of tiles) enrolPoints(unit);
  return h("div", { class: "glance" }, tiles.map(([unit, id, title]) => tile(unit, id, title)));
}
