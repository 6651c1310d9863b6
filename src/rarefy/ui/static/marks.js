// Each method keeps one colour and one shape on the whole page; the shape alone tells methods apart.
import { svg } from "./dom.js";

const SHAPES = ["circle", "square", "triangle", "diamond", "down", "hexagon", "cross", "bar"];
const PATHS = {
  circle: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", square: "M-4-4h8v8h-8z", triangle: "M0-5.4L5 3.6H-5z", diamond: "M0-5.6L5.6 0L0 5.6L-5.6 0z",
  down: "M0 5.4L5-3.6H-5z", hexagon: "M-5 0L-2.5-4.4H2.5L5 0L2.5 4.4H-2.5z", cross: "M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3z",
  bar: "M-2.2-5.5h4.4v11h-4.4z", star: "M0-7L1.8-2.2L6.9-2L2.9 1.2L4.2 6.2L0 3.3L-4.2 6.2L-2.9 1.2L-6.9-2L-1.8-2.2z",
};
const places = new Map();

// Gives each method of one panel a place of its own; a method met before keeps the one it has.
export function enrol(names) {
  const taken = new Set(names.filter((n) => places.has(n)).map((n) => places.get(n)));
  for (const name of new Set(names)) {
    if (places.has(name)) continue;
    let free = 0;
    while (taken.has(free)) free++;
    places.set(name, free);
    taken.add(free);
  }
}

export function look(method, role) {
  if (role === "dense") return { tone: "dense", path: PATHS.star, role };
  if (!places.has(method)) enrol([method]);
  const i = places.get(method);
  if (role === "baseline") return { tone: "base", path: PATHS[SHAPES[(i * 3 + 1) % SHAPES.length]], role };
  return { tone: "c" + (i % 8), path: PATHS[SHAPES[(i + Math.floor(i / 8)) % SHAPES.length]], role };
}

export const mark = (style, x = 0, y = 0) => svg("path", { d: style.path, transform: `translate(${x} ${y}) scale(1.15)`, class: `mark ${style.tone}` });
export const key = (style) => svg("svg", { viewBox: "-9 -9 18 18", width: "18", height: "18", class: "key", "aria-hidden": "true" }, mark(style));
