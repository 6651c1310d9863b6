// Shares as shaded cells: heat maps with their figures, and masks as pictures.
import { h, svg } from "./dom.js";
import { known, num } from "./format.js";

const CELL = 34;

function cells(grid, wide, high) {
  return grid.values.map((row, j) => {
    const out = [];
    for (let i = 0, from = 0; i < row.length; i = from) {
      // Equal neighbours of a mask are one rectangle: a picture has thousands of cells.
      for (from = i + 1; !grid.figures && from < row.length && row[from] === row[i]; from++);
      if (!known(row[i]) || (!grid.figures && row[i] === 0)) continue;
      out.push(svg("rect", { x: i * wide, y: j * high, width: (from - i) * wide, height: high, class: "cell", "fill-opacity": Math.min(1, Math.max(0, row[i])) }));
      if (grid.figures) out.push(svg("text", { x: (i + 0.5) * wide, y: (j + 0.5) * high + 4, "text-anchor": "middle", class: row[i] > 0.6 ? "on-cell" : "off-cell" }, num(row[i], 2)));
    }
    return out;
  });
}

function picture(grid) {
  const across = grid.values[0]?.length ?? 0, down = grid.values.length;
  const wide = grid.figures ? CELL * 1.5 : 256 / Math.max(1, across), high = grid.figures ? CELL : 256 / Math.max(1, down);
  const left = grid.rows.length ? 14 + 7 * Math.max(...grid.rows.map((r) => r.length)) : 1, top = grid.columns.length ? 22 : 1;
  const width = left + across * wide + 1, height = top + down * high + 1;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": grid.title, class: "grid-picture" },
    svg("g", { transform: `translate(${left} ${top})` },
      cells(grid, wide, high),
      svg("rect", { x: 0, y: 0, width: across * wide, height: down * high, class: "grid-edge" }),
      grid.columns.map((name, i) => svg("text", { x: (i + 0.5) * wide, y: -8, "text-anchor": "middle", class: "tick" }, name)),
      grid.rows.map((name, j) => svg("text", { x: -8, y: (j + 0.5) * high + 4, "text-anchor": "end", class: "tick" }, name))));
}

export function gridsPanel(grids) {
  return h("div", { class: "grids" }, grids.map((g) => h("figure", { class: "panel" }, h("h4", {}, g.title), h("div", { class: "scroll" }, picture(g)), g.note && h("figcaption", { class: "faint" }, g.note))));
}
