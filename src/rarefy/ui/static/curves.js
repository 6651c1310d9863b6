// Training curves: one small chart a quantity, one line a method.
import { h, onWidth, svg } from "./dom.js";
import { known, metricName, num } from "./format.js";
import { enrol, key, look } from "./marks.js";
import { makeScale } from "./scale.js";


function smallChart(name, curves, width) {
  const height = 210, box = { left: 54, right: 12, top: 12, bottom: 28 };
  const lines = curves.map((c) => ({ name: c.method, pts: c.series.step.map((s, i) => [s, c.series[name][i]]).filter(([s, v]) => known(s) && known(v)) })).filter((c) => c.pts.length);
  const all = lines.flatMap((c) => c.pts);
  if (!all.length) return null;
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [s, v] of all) { x0 = Math.min(x0, s); x1 = Math.max(x1, s); y0 = Math.min(y0, v); y1 = Math.max(y1, v); }
  const log = y0 > 0 && y1 / y0 > 30;
  if (!log) { if (y0 > 0 && y0 < 0.4 * y1) y0 = 0; y1 += (y1 - y0) * 0.05 || (y0 === 0 ? 1 : 0); }
  const x = makeScale("linear", [x0, x1], [box.left, width - box.right], { gap: 60 });
  const y = makeScale(log ? "log" : "linear", [y0, y1], [height - box.bottom, box.top], { gap: 32 });
  const cross = svg("line", { class: "cross", y1: box.top, y2: height - box.bottom, visibility: "hidden" });
  const readout = h("p", { class: "readout", "aria-live": "off" });
  const rest = () => readout.replaceChildren(...lines.map((c) => h("span", { class: "with-key" }, key(look(c.name, "method")), num(c.pts.at(-1)[1]))));
  const move = (e) => {
    const r = e.currentTarget.getBoundingClientRect();
    const at = x0 + ((e.clientX - r.left) * (width / r.width) - box.left) / (width - box.left - box.right) * (x1 - x0);
    const near = lines.map((c) => c.pts.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    cross.setAttribute("x1", x(near[0][0])); cross.setAttribute("x2", x(near[0][0])); cross.setAttribute("visibility", "visible");
    readout.replaceChildren(`step ${num(near[0][0])} `, ...near.map((p, i) => h("span", { class: "with-key" }, key(look(lines[i].name, "method")), num(p[1]))));
  };
  rest();
  const said = lines.map((c) => `${c.name} from ${num(c.pts[0][1])} to ${num(c.pts.at(-1)[1])}`).join("; ");
  return [svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${metricName(name)} over training steps: ${said}`,
    onpointermove: move, onpointerleave: () => { cross.setAttribute("visibility", "hidden"); rest(); } },
  y.ticks.map((v) => [svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: y(v), y2: y(v) }), svg("text", { class: "tick", x: box.left - 7, y: y(v) + 4, "text-anchor": "end" }, num(v))]),
  x.ticks.map((v) => svg("text", { class: "tick", x: x(v), y: height - 8, "text-anchor": v === x.ticks.at(-1) && x(v) > width - 40 ? "end" : "middle" }, num(v))),
  lines.map((c) => {
    const style = look(c.name, "method"), [ex, ey] = c.pts.at(-1);
    return [svg("path", { class: `series ${style.tone}`, d: "M" + c.pts.map((p) => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L") }),
      svg("path", { d: style.path, class: `mark ${style.tone}`, transform: `translate(${x(ex)} ${y(ey)})` })];
  }), cross), readout];
}

export function curvesPanel(curves) {
  enrol(curves.map((c) => c.method));
  const names = [...new Set(curves.flatMap((c) => Object.keys(c.series)))].filter((n) => n !== "step");
  const cells = names.map((name) => {
    const cell = h("figure", { class: "small" }), mine = curves.filter((c) => c.series[name]);
    onWidth(cell, (width) => {
      const drawn = smallChart(name, mine, width);
      cell.replaceChildren(h("figcaption", {}, metricName(name)), ...(drawn ?? [h("p", { class: "faint" }, "no values")]));
    });
    return cell;
  });
  return h("div", { class: "panel" }, h("ul", { class: "legend" }, curves.map((c) => h("li", {}, key(look(c.method, "method")), c.method))), h("div", { class: "smalls" }, cells));
}
