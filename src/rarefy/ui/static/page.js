// The page is a function of one report.
import { drawNow, h, table } from "./dom.js";
import { bytes, num, seconds, times } from "./format.js";
import { curvesPanel } from "./curves.js";
import { frontierPanel } from "./frontier.js";
import { glancePanel } from "./glance.js";
import { gridsPanel } from "./grids.js";
import { latentsPanel } from "./latents.js";

const TITLES = { latents: "Latents", weights: "Weights", neurons: "Neurons", attention: "Attention", tokens: "Tokens", experts: "Experts", memory: "Memory" };
const STATES = ["auto", "light", "dark"];

function themeButton() {
  const root = document.documentElement;
  const keep = (v) => { try { localStorage.setItem("rarefy-theme", v); } catch { /* private mode or file: the choice lasts for this visit */ } };
  let state = "auto";
  try { state = localStorage.getItem("rarefy-theme") ?? "auto"; } catch { /* same */ }
  if (!STATES.includes(state)) state = "auto";
  const button = h("button", { type: "button", class: "theme", onclick: () => { state = STATES[(STATES.indexOf(state) + 1) % 3]; keep(state); show(); } });
  const show = () => {
    if (state === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", state);
    button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[state];
    button.setAttribute("aria-label", `Colours: ${state}. Change`);
  };
  show();
  return button;
}

function facts(pairs) {
  const kept = pairs.filter(([, v]) => v !== undefined && v !== null && v !== "" && v !== "–");
  return h("dl", { class: "facts" }, kept.map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v))));
}

function header(report) {
  const { made, model } = report;
  return h("header", { class: "top" },
    h("p", { class: "brand" }, "rarefy", themeButton()),
    h("h1", {}, report.title),
    h("p", { class: "command" }, h("code", {}, "$ " + made.command)),
    facts([["model", model.name], ["parameters", num(model.params)], ["layers", num(model.layers)], ["width", num(model.d_model)], ["vocabulary", num(model.vocab)],
      ["took", seconds(made.seconds)], ["made", made.date]]));
}

function costTable(costs) {
  const has = (k) => costs.some((c) => typeof c[k] === "number"), noted = costs.some((c) => c.note);
  const groups = [["flops", "FLOPs a token", num], ["bytes", "bytes a token", bytes], ["ms", "ms", num]].filter(([k]) => has(k));
  const head = ["what", ...groups.flatMap(([, name]) => [name, "dense", "less"]), ...(noted ? ["note"] : [])];
  const rows = costs.map((c) => [c.what, ...groups.flatMap(([k, , f]) => [f(c[k]), f(c["dense_" + k]), times(c["dense_" + k], c[k])]), ...(noted ? [c.note ?? ""] : [])]);
  return h("div", { class: "panel" }, table(head, rows, "Cost of each part, sparse and dense"));
}

function howMade(report) {
  const { made, model, steps } = report, versions = Object.entries(made.versions ?? {});
  return h("div", { class: "panel" },
    facts([["machine", made.machine], ["data", model.data], ["held out", model.heldout], ["versions", versions.map(([k, v]) => `${k} ${v}`).join(", ")]]),
    steps.length ? table(["step", "time", "note"], steps.map((s) => [s.name, seconds(s.seconds), s.note ?? ""]), "Steps and their time") : null);
}

function section(id, title, sub, ...body) {
  return h("section", { id, "aria-labelledby": id + "-title" }, h("h2", { id: id + "-title" }, title), sub && h("p", { class: "question" }, sub), body);
}

function noted(t) {
  return h("div", { class: "panel" }, h("h3", {}, t.title), t.verdict && h("p", { class: "verdict" }, t.verdict), t.note && h("p", { class: "faint" }, t.note), table(t.head, t.rows, t.title));
}

export function renderPage(report, root) {
  document.title = report.title;
  const titles = report.units.map((u) => u.title ?? TITLES[u.unit] ?? u.unit);
  const units = report.units.map((u, i) => section(`unit-${i}`, titles[i], u.question, u.verdict && h("p", { class: "verdict" }, u.verdict), frontierPanel(u)));
  const parts = [
    units.length > 1 && [section("glance", "At a glance", "What is kept, left to right, against what it costs in quality; the dotted line is the dense model.",
      glancePanel(report.units.map((u, i) => [u, units[i].id, titles[i]]))), "At a glance"],
    report.tables?.length && [section("tables", "Findings", null, report.tables.map(noted)), "Findings"],
    ...units.map((node, i) => [node, titles[i]]),
    report.grids?.length && [section("grids", "What is kept", "Darker cells keep more.", gridsPanel(report.grids)), "What is kept"],
    report.curves.length && [section("training", "Training", null, curvesPanel(report.curves)), "Training"],
    report.latents && [section("browser", "Latent browser", null, latentsPanel(report.latents)), "Latent browser"],
    report.costs.length && [section("cost", "Cost", "What each part reads and computes, next to the dense model.", costTable(report.costs)), "Cost"],
    report.notes.length && [section("notes", "Notes", null, h("ul", { class: "notes" }, report.notes.map((n) => h("li", {}, n)))), "Notes"],
    [section("made", "How it was made", null, howMade(report)), "How it was made"],
  ].filter(Boolean);
  const nav = h("nav", { "aria-label": "Sections" }, parts.map(([node, name]) => h("a", { href: "#" + node.id }, name)));
  root.replaceChildren(header(report), nav, ...parts.map(([node]) => node));
  root.removeAttribute("aria-busy");
  drawNow();
  // The place named in the address did not exist yet when the browser looked for it.
  if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
}
