// One unit's panel: quality kept against cost paid, for methods, baselines and the dense model.
import { h, onWidth, svg, table } from "./dom.js";
import { better, bytes, interval, known, metricName, num, percent } from "./format.js";
import { enrol, key, look, mark } from "./marks.js";
import { makeScale } from "./scale.js";

const SHARES = ["flops", "bytes", "ms"];
const CROWD = 9; // from so many methods on, those on the front and the one picked stand out, and the others are grey

export function costShare(point, name) {
  const cost = point.cost ?? {};
  return cost["dense_" + name] > 0 && typeof cost[name] === "number" ? cost[name] / cost["dense_" + name] : null;
}
const xOf = (p, name) => (SHARES.includes(name) ? (p.role === "dense" ? 1 : costShare(p, name)) : (p[name] ?? p.metrics?.[name]?.mean ?? null));
const yOf = (p, name) => p.metrics?.[name] ?? null;

// Points that no other beats. Costs within 2 % count as equal: methods rarely hit a budget to the digit.
export function paretoFront(points, x, y, side) {
  const sign = side === "high" ? -1 : 1;
  const all = points.filter((p) => p.role !== "dense" && known(xOf(p, x)) && known(yOf(p, y)?.mean)).map((p) => ({ p, x: xOf(p, x), y: sign * yOf(p, y).mean }));
  const beaten = (a) => all.some((b) => b !== a && ((b.y < a.y && b.x <= a.x + 0.02 * Math.abs(a.x)) || (b.y === a.y && b.x < a.x)));
  return all.filter((a) => !beaten(a)).sort((a, b) => a.x - b.x).map((a) => a.p);
}

function axes(unit, state, width, height, box) {
  const drawn = unit.points.filter((p) => known(xOf(p, state.x)) && known(yOf(p, state.y)?.mean));
  const some = drawn.filter((p) => p.role !== "dense");
  const base = some.length ? some : drawn;
  const xs = base.map((p) => xOf(p, state.x));
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const logX = x0 > 0 && x1 / x0 > 20;
  const dense = drawn.find((p) => p.role === "dense");
  const denseX = dense ? xOf(dense, state.x) : null;
  if (known(denseX) && !logX && denseX >= x0 && denseX - x1 <= 0.7 * (x1 - x0)) x1 = Math.max(x1, denseX);
  const ys = drawn.flatMap((p) => { const m = yOf(p, state.y); return [m.mean, m.low, m.high].filter(known); });
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const sizes = drawn.map((p) => Math.abs(yOf(p, state.y).mean)).filter((v) => v > 0).sort((a, b) => a - b);
  const knee = Math.max(sizes[Math.floor(sizes.length / 4)] ?? 1, (sizes.at(-1) ?? 1) / 1000);
  const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
  if (state.log) { y0 = y0 < 0 ? y0 * 1.15 : y0 * 0.85 - knee * 0.15; y1 = y1 > 0 ? y1 * 1.15 : y1 * 0.85; } else { y0 -= pad; y1 += pad; }
  const gutter = box.label && width > 620 ? box.label : 14;
  const x = makeScale(logX ? "log" : "linear", [x0, x1], [box.left + gutter, width - box.right - 18], { gap: box.label ? 64 : 34 });
  const y = makeScale(state.log ? "asinh" : "linear", [y0, y1], [height - box.bottom, box.top], { knee, gap: 30 });
  return { x, y, drawn, dense, denseX };
}

function describe(p, state) {
  const lines = [
    ["kept", `${percent(p.density)} (asked ${percent(p.budget)})`],
    ...Object.entries(p.metrics ?? {}).map(([k, m]) => [metricName(k), interval(m)]),
    ...SHARES.filter((k) => known(costShare(p, k))).map((k) => [metricName(k), percent(costShare(p, k))]),
  ];
  return { title: `${p.method} · ${p.role}`, lines, text: `${p.method}, ${p.role}: ${metricName(state.x)} ${num(xOf(p, state.x))}, ${metricName(state.y)} ${interval(yOf(p, state.y))}` };
}

const tip = () => document.getElementById("tip") ?? document.body.appendChild(h("div", { id: "tip", role: "tooltip", hidden: true }));
function showTip(node, said) {
  const box = tip(), r = node.getBoundingClientRect();
  box.replaceChildren(h("b", {}, said.title), h("dl", {}, said.lines.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])));
  box.hidden = false;
  const w = box.offsetWidth, tall = box.offsetHeight;
  box.style.left = Math.max(8, Math.min(innerWidth - w - 8, r.left + r.width / 2 - w / 2)) + "px";
  box.style.top = (r.top - tall - 10 > 4 ? r.top - tall - 10 : r.bottom + 10) + "px";
}
const hideTip = () => { tip().hidden = true; };

const short = (name) => (name.length > 26 ? name.slice(0, 25) + "…" : name);

function placeLabels(series, box, denseY) {
  const placed = known(denseY) ? [{ y: denseY - 6, left: box.left, right: box.left + 44 }] : [];
  for (const s of [...series].sort((a, b) => a.at[0][1] - b.at[0][1])) {
    const [px, py] = s.at[0], left = px - 14 - short(s.name).length * 6.8, right = px - 12;
    const free = (y) => y >= box.top && y <= box.floor && !placed.some((q) => Math.abs(q.y - y) < 15 && left < q.right && q.left < right);
    const shift = Array.from({ length: 80 }, (_, i) => (i % 2 ? 1 : -1) * 3 * Math.ceil(i / 2)).find((d) => free(py + d)) ?? 0;
    placed.push({ s, y: py + shift, px, py, left, right });
  }
  return placed.filter((q) => q.s).map(({ s, y, px, py }) => [
    Math.abs(y - py) > 4 && svg("path", { class: "leader", d: `M${px - 7} ${py}L${px - 12} ${y}` }),
    svg("text", { x: px - 14, y: y + 4, class: `label ${s.style.tone}`, "text-anchor": "end" }, short(s.name)),
  ]);
}

function grid(ax, state, width, height, box) {
  const xs = SHARES.includes(state.x) || state.x === "density" || state.x === "budget" ? percent : num;
  return [
    ax.y.ticks.map((v) => [
      svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: ax.y(v), y2: ax.y(v) }),
      svg("text", { class: "tick", x: box.left - 8, y: ax.y(v) + 4, "text-anchor": "end" }, num(v)),
    ]),
    ax.x.ticks.map((v) => [
      svg("line", { class: "stub", x1: ax.x(v), x2: ax.x(v), y1: height - box.bottom, y2: height - box.bottom + 5 }),
      svg("text", { class: "tick", x: ax.x(v), y: height - box.bottom + 19, "text-anchor": "middle" }, xs(v)),
    ]),
    svg("line", { class: "axis", x1: box.left, x2: width - box.right, y1: height - box.bottom, y2: height - box.bottom }),
  ];
}

function seriesOf(ax, state) {
  const groups = new Map();
  for (const p of ax.drawn) if (p.role !== "dense") groups.set(p.method, [...(groups.get(p.method) ?? []), p]);
  return [...groups].map(([name, points]) => {
    points.sort((a, b) => xOf(a, state.x) - xOf(b, state.x));
    return { name, points, style: look(name, points[0].role), at: points.map((p) => [ax.x(xOf(p, state.x)), ax.y(yOf(p, state.y).mean)]) };
  });
}

// The names that stand out of a crowd; all where there is none.
function foremost(unit, state, front) {
  const names = new Set(unit.points.filter((p) => p.role !== "dense").map((p) => p.method));
  return names.size < CROWD ? names : new Set([...[...front].map((p) => p.method), ...(names.has(state.pick) ? [state.pick] : [])]);
}

function pointNode(p, [px, py], style, ax, state, front, back = false) {
  const m = yOf(p, state.y), said = describe(p, state);
  const whisker = known(m.low) && known(m.high) && Math.abs(ax.y(m.low) - ax.y(m.high)) > 3
    && svg("path", { class: `whisker ${style.tone}`, d: `M${px} ${ax.y(m.low)}V${ax.y(m.high)}M${px - 3} ${ax.y(m.low)}h6M${px - 3} ${ax.y(m.high)}h6` });
  return svg("g", {
    class: back ? "point back" : "point", tabindex: "-1", role: "img", "aria-label": said.text + (front ? ", on the Pareto front" : ""),
    onpointerenter: (e) => showTip(e.currentTarget, said), onpointerleave: hideTip, onfocus: (e) => showTip(e.currentTarget, said), onblur: hideTip,
  }, !back && whisker, svg("circle", { class: "halo", cx: px, cy: py, r: 11 }), mark(style, px, py));
}

// small: without names, for a row of charts.
export function chart(unit, state, width, small = false) {
  const height = small ? 180 : Math.round(Math.max(280, Math.min(430, width * 0.52)));
  const longest = Math.max(0, ...unit.points.map((p) => (p.role === "dense" ? 0 : p.method.length)));
  const box = small ? { left: 44, right: 4, top: 12, bottom: 24 } : { left: 62, right: 12, top: 16, bottom: 44, floor: height - 48, label: Math.min(190, longest * 6.6 + 22) };
  const ax = axes(unit, state, width, height, box);
  if (!ax.drawn.length) return h("p", { class: "wait" }, "No point has both quantities.");
  const side = state.y === unit.y.key ? unit.y.better : better(state.y);
  const front = new Set(paretoFront(unit.points, state.x, state.y, side)), fore = foremost(unit, state, front);
  const series = seriesOf(ax, state).sort((a, b) => fore.has(a.name) - fore.has(b.name));
  const line = (pts) => "M" + pts.map((q) => q.map((v) => v.toFixed(1)).join(" ")).join("L");
  const nodes = series.flatMap((s) => s.points.map((p, i) => pointNode(p, s.at[i], s.style, ax, state, front.has(p), !fore.has(s.name))));
  const denseY = ax.dense && ax.y(yOf(ax.dense, state.y).mean);
  if (ax.dense && known(ax.denseX) && ax.denseX <= ax.x.domain[1]) nodes.push(pointNode(ax.dense, [ax.x(ax.denseX), denseY], look("dense", "dense"), ax, state, false));
  if (nodes.length && !small) nodes[0].setAttribute("tabindex", "0");
  return svg("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": `${metricName(state.y)} against ${metricName(state.x)}; arrow keys move between ${nodes.length} points`,
    onkeydown: (e) => roam(e, nodes),
  },
  grid(ax, state, width, height, box),
  !small && svg("text", { class: "axis-name", x: width - box.right, y: height - 6, "text-anchor": "end" }, (state.x === unit.x.key ? unit.x.label : metricName(state.x)) + " →"),
  ax.dense && [svg("line", { class: "dense-line", x1: box.left, x2: width - box.right, y1: denseY, y2: denseY }),
    svg("text", { class: "label dense", x: box.left + 6, y: denseY - 5 }, "dense")],
  front.size > 1 && svg("path", { class: "front", d: line([...front].map((p) => [ax.x(xOf(p, state.x)), ax.y(yOf(p, state.y).mean)])) }),
  series.map((s) => s.at.length > 1 && svg("path", { class: `series ${s.style.tone} ${s.style.role}${fore.has(s.name) ? "" : " back"}`, d: line(s.at) })),
  nodes, !small && width > 620 && placeLabels(series.filter((s) => fore.has(s.name)), box, denseY));
}

function roam(e, nodes) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
  if (e.key === "Escape") hideTip();
  if (!step) return;
  e.preventDefault();
  const next = nodes[(nodes.indexOf(document.activeElement) + step + nodes.length) % nodes.length];
  for (const n of nodes) n.setAttribute("tabindex", n === next ? "0" : "-1");
  next.focus();
}

function pointTable(unit, state) {
  const front = new Set(paretoFront(unit.points, state.x, state.y, state.y === unit.y.key ? unit.y.better : better(state.y)));
  const metrics = [...new Set(unit.points.flatMap((p) => Object.keys(p.metrics ?? {})))];
  const costs = SHARES.filter((k) => unit.points.some((p) => known(costShare(p, k))));
  const rows = [...unit.points].sort((a, b) => (a.role === "dense" ? -1 : b.role === "dense" ? 1 : 0) || a.budget - b.budget || a.method.localeCompare(b.method))
    .map((p) => [h("span", { class: "with-key" }, key(look(p.method, p.role)), p.method), p.role, percent(p.budget), percent(p.density),
      ...metrics.map((k) => interval(p.metrics?.[k])), ...costs.map((k) => percent(costShare(p, k))),
      bytes(p.cost?.bytes), front.has(p) ? "✓ front" : ""]);
  return table(["method", "role", "asked", "kept", ...metrics.map(metricName), ...costs.map(metricName), "bytes a token", "Pareto"], rows, `Points of ${unit.unit}`);
}

function chooser(label, options, value, onpick) {
  const pick = h("select", { onchange: (e) => onpick(e.target.value) }, options.map((o) => h("option", { value: o, selected: o === value }, metricName(o))));
  return h("label", { class: "choose" }, h("span", {}, label), pick);
}

export function enrolPoints(unit) {
  for (const role of ["method", "baseline"]) enrol(unit.points.filter((p) => p.role === role).map((p) => p.method));
}

// The axes a unit is first drawn on.
export function startState(unit) {
  const sizes = unit.points.map((p) => Math.abs(p.metrics?.[unit.y.key]?.mean ?? 0)).filter((v) => v > 0);
  return { x: unit.x.key, y: unit.y.key, log: unit.y.better !== "high" && Math.max(...sizes) / Math.min(...sizes) > 10 };
}

function legendOf(names, fore) {
  const shown = [...names].filter(([name, role]) => role === "dense" || fore.has(name)), rest = names.size - shown.length;
  return [
    ...shown.map(([name, role]) => h("li", {}, key(look(name, role)), name, role === "baseline" && h("span", { class: "faint" }, " baseline"))),
    h("li", {}, svg("svg", { viewBox: "0 0 26 10", width: "26", height: "10", "aria-hidden": "true" }, svg("path", { class: "front", d: "M1 5H25" })), "Pareto front"),
    ...(rest ? [h("li", { class: "faint" }, `${rest} more, in grey: none on the front; point at one, or bring it out`)] : []),
  ];
}

export function frontierPanel(unit) {
  enrolPoints(unit);
  const metrics = [...new Set(unit.points.flatMap((p) => Object.keys(p.metrics ?? {})))];
  const xs = [...new Set([unit.x.key, "density", "budget"]), ...SHARES.filter((k) => unit.points.some((p) => known(costShare(p, k))))];
  const state = startState(unit);
  const plot = h("div", { class: "plot" }), drawer = h("div", { hidden: true }), legend = h("ul", { class: "legend" });
  const names = new Map(unit.points.map((p) => [p.method, p.role]));
  let last = 0;
  const draw = (width) => {
    last = width;
    const side = state.y === unit.y.key ? unit.y.better : better(state.y);
    const fore = foremost(unit, state, new Set(paretoFront(unit.points, state.x, state.y, side)));
    legend.replaceChildren(...legendOf(names, fore));
    plot.replaceChildren(h("p", { class: "y-name" }, state.y === unit.y.key ? unit.y.label : metricName(state.y), h("span", {}, side === "low" ? " ↓ lower is better" : " ↑ higher is better")), chart(unit, state, width));
    if (!drawer.hidden) drawer.replaceChildren(pointTable(unit, state));
  };
  onWidth(plot, draw);
  const toggle = h("button", { type: "button", "aria-expanded": "false", onclick: () => {
    drawer.hidden = !drawer.hidden; toggle.setAttribute("aria-expanded", String(!drawer.hidden)); toggle.textContent = drawer.hidden ? "Show table" : "Hide table"; draw(last);
  } }, "Show table");
  return h("div", { class: "panel" },
    h("div", { class: "controls" },
      chooser("Quality", [...new Set([state.y, ...metrics])], state.y, (v) => { state.y = v; draw(last); }),
      chooser("Cost", [...new Set([state.x, ...xs])], state.x, (v) => { state.x = v; draw(last); }),
      h("label", { class: "choose" }, h("input", { type: "checkbox", checked: state.log, onchange: (e) => { state.log = e.target.checked; draw(last); } }), h("span", {}, "log scale")),
      names.size > CROWD && h("label", { class: "choose" }, h("span", {}, "Bring out"), h("select", { onchange: (e) => { state.pick = e.target.value; draw(last); } },
        ["", ...[...names].filter(([, role]) => role !== "dense").map(([name]) => name).sort()].map((name) => h("option", { value: name }, name || "–")))),
      toggle),
    plot, legend, drawer);
}
