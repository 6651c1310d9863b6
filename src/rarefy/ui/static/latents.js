// The latent browser: a virtual list of any length, and the page of one latent.
import { h, onWidth, svg, tokenText } from "./dom.js";
import { known, num, percent } from "./format.js";

const ROW = 30;
const SORTS = [["id", "number", 1], ["density", "density", -1], ["f1", "F1 of the concept", -1], ["max", "strongest activation", -1], ["precision", "precision", -1]];

export function makeIndex(latents) {
  const t = latents.table, n = t.density.length;
  const id = (row) => t.id?.[row] ?? row;
  const concept = (row) => (known(t.concept?.[row]) && t.concept[row] >= 0 ? latents.concepts[t.concept[row]] : "");
  let text = null;
  const words = () => (text ??= Array.from({ length: n }, (_, row) => {
    const top = latents.top?.[row];
    const heard = top ? [...(top.logits_up ?? []).map(([i]) => i), ...(top.contexts ?? []).map((c) => c.tokens[c.pos])] : [];
    return (concept(row) + "\u0000" + heard.map((i) => (latents.tokens[i] ?? "").slice(0, 200)).join("\u0000")).toLowerCase();
  }));
  const find = (query, by, alive) => {
    const asked = query.trim().toLowerCase(), number = /^#?\d+$/.test(asked) ? Number(asked.replace("#", "")) : null;
    let rows = Array.from({ length: n }, (_, row) => row);
    if (alive) rows = rows.filter((row) => t.density[row] > 0);
    if (asked) rows = rows.filter((row) => id(row) === number || (!asked.startsWith("#") && words()[row].includes(asked)));
    const [column, , sign] = SORTS.find(([c]) => c === by);
    const value = (row) => (column === "id" ? id(row) : known(t[column]?.[row]) ? t[column][row] : Infinity * sign);
    const exact = (row) => (number !== null && id(row) === number ? 0 : 1);
    const key = new Float64Array(n);
    for (const row of rows) key[row] = sign * value(row);
    return rows.sort((a, b) => exact(a) - exact(b) || (key[a] < key[b] ? -1 : key[a] > key[b] ? 1 : a - b));
  };
  return { n, id, concept, find, table: t };
}

function virtualList(index, onpick) {
  let rows = [], at = 0, first = -1, last = -1;
  const space = h("div", { class: "space" });
  const view = h("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Latents" }, space);
  const paint = (force) => {
    const from = Math.max(0, Math.floor(view.scrollTop / ROW) - 6), to = Math.min(rows.length, from + Math.ceil((view.clientHeight || 520) / ROW) + 12);
    if (!force && from === first && to === last) return;
    [first, last] = [from, to];
    space.replaceChildren(...rows.slice(from, to).map((row, i) => {
      const place = from + i;
      return h("div", { class: "row", id: "latent-" + place, role: "option", "aria-selected": String(place === at), "aria-posinset": place + 1, "aria-setsize": rows.length,
        style: { top: place * ROW + "px" }, onclick: () => choose(place) },
      h("span", { class: "id" }, "#" + index.id(row)), h("span", { class: "what" }, index.concept(row) || "–"),
      h("span", { class: "n" }, index.table.density[row] > 0 ? percent(index.table.density[row]) : "dead"), h("span", { class: "n" }, known(index.table.f1?.[row]) ? index.table.f1[row].toFixed(2) : ""));
    }));
    view.setAttribute("aria-activedescendant", "latent-" + at);
  };
  const choose = (place, tell = true) => {
    at = Math.max(0, Math.min(rows.length - 1, place));
    const top = at * ROW, tall = view.clientHeight || 520;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + ROW > view.scrollTop + tall) view.scrollTop = top + ROW - tall;
    paint(true);
    if (tell && rows.length) onpick(rows[at]);
  };
  view.addEventListener("scroll", () => paint(false), { passive: true });
  view.addEventListener("keydown", (e) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -1e9, End: 1e9 }[e.key];
    if (step) { e.preventDefault(); choose(at + step); }
  });
  onWidth(view, () => paint(true));
  return { view, set(found) { rows = found; space.style.height = rows.length * ROW + "px"; view.scrollTop = 0; first = -1; choose(0); }, go(row) { const place = rows.indexOf(row); if (place >= 0) choose(place); } };
}

export function histogram(counts, { label, from, to, log = true }) {
  const width = 260, height = 84, most = Math.max(1, ...counts), size = (c) => (c <= 0 ? 0 : log ? Math.log1p(c) / Math.log1p(most) : c / most) * (height - 22);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "hist", role: "img", "aria-label": `${label}: ${counts.map((c) => num(c)).join(", ")}` },
    counts.map((c, i) => svg("rect", { x: (i * width) / counts.length + 0.5, width: Math.max(1, width / counts.length - 1.5), y: height - 16 - size(c), height: size(c), rx: 1 }, svg("title", {}, num(c)))),
    svg("line", { class: "axis", x1: 0, x2: width, y1: height - 16, y2: height - 16 }),
    svg("text", { class: "tick", x: 0, y: height - 3 }, from), svg("text", { class: "tick", x: width, y: height - 3, "text-anchor": "end" }, to));
}

function logitList(title, pairs, tokens, sign) {
  const most = Math.max(1e-9, ...pairs.map(([, v]) => Math.abs(v)));
  return h("div", { class: "logits" }, h("h4", {}, title), h("ol", {}, pairs.map(([i, v]) => h("li", {}, h("code", {}, tokenText(tokens[i] ?? `?${i}`, 40)),
    h("span", { class: "bar " + sign, style: { "--w": (Math.abs(v) / most).toFixed(3) } }), h("span", { class: "n" }, (v > 0 ? "+" : "") + num(v))))));
}

function contextLine(context, tokens, most) {
  const spans = context.tokens.map((i, at) => {
    const act = context.acts[at] ?? 0, share = Math.max(0, Math.min(1, act / most)), text = tokens[i] ?? `?${i}`;
    return h("span", { class: "tok" + (act > 0 ? " on" : "") + (at === context.pos ? " peak" : ""), style: act > 0 ? { "--a": share.toFixed(3) } : null, title: `${tokenText(text)}  activation ${num(act)}` }, tokenText(text));
  });
  return h("li", {}, h("span", { class: "n act" }, num(context.acts[context.pos] ?? 0)), h("span", { class: "text" }, spans.flatMap((s, i) => [s, (tokens[context.tokens[i]] ?? "").includes("\n") ? h("br") : h("wbr")])), context.doc && h("span", { class: "doc" }, context.doc));
}

function latentPage(latents, index, row) {
  const t = index.table, top = latents.top?.[row], value = (k, f) => (known(t[k]?.[row]) ? f(t[k][row]) : "–");
  const concept = index.concept(row), most = known(t.max?.[row]) && t.max[row] > 0 ? t.max[row] : Math.max(1e-9, ...(top?.contexts ?? []).flatMap((c) => c.acts));
  const facts = [["density", t.density[row] > 0 ? percent(t.density[row]) : "0 (dead)"], ["strongest", value("max", num)], ["precision", value("precision", (v) => v.toFixed(3))], ["recall", value("recall", (v) => v.toFixed(3))], ["F1", value("f1", (v) => v.toFixed(3))]];
  return [
    h("h3", { tabindex: "-1" }, `Latent #${index.id(row)}`, concept && h("span", { class: "concept" }, concept)),
    h("dl", { class: "facts" }, facts.map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v)))),
    !top && h("p", { class: "faint" }, "No contexts were kept for this latent."),
    top && h("div", { class: "trio" },
      top.hist?.length ? h("div", {}, h("h4", {}, "Activations, log count"), histogram(top.hist, { label: "activation counts", from: "0", to: num(t.max?.[row]) })) : null,
      top.logits_up?.length ? logitList("Raises", top.logits_up, latents.tokens, "up") : null, top.logits_down?.length ? logitList("Lowers", top.logits_down, latents.tokens, "down") : null),
    top?.contexts?.length ? [h("h4", {}, "Where it fires most", h("span", { class: "faint" }, " (· space, ⏎ newline, ⇥ tab; the peak is boxed)")), h("ol", { class: "contexts" }, top.contexts.map((c) => contextLine(c, latents.tokens, most)))] : null,
  ].flat().filter(Boolean);
}

function densityChart(density) {
  const alive = density.filter((v) => v > 0).map(Math.log10);
  if (!alive.length) return null;
  let low = Infinity, high = -Infinity;
  for (const v of alive) { low = Math.min(low, v); high = Math.max(high, v); }
  low = Math.floor(low); high = Math.max(low + 1, Math.ceil(high));
  const counts = new Array(36).fill(0);
  for (const v of alive) counts[Math.min(35, Math.floor(((v - low) / (high - low)) * 36))]++;
  return h("div", { class: "spread" }, h("h4", {}, "Densities of all latents, log axis"), histogram(counts, { label: "latents by log density", from: percent(10 ** low), to: percent(10 ** high), log: false }));
}

export function latentsPanel(latents) {
  const index = makeIndex(latents), page = h("article", { class: "latent", "aria-live": "polite" }), count = h("p", { class: "faint count", role: "status" });
  const list = virtualList(index, (row) => page.replaceChildren(...latentPage(latents, index, row)));
  const state = { query: "", by: known(latents.table.f1?.find(known)) ? "f1" : "density", alive: false };
  const update = () => {
    const rows = index.find(state.query, state.by, state.alive);
    count.textContent = `${rows.length.toLocaleString("en")} of ${index.n.toLocaleString("en")} latents`;
    list.set(rows);
    if (!rows.length) page.replaceChildren(h("p", { class: "wait" }, "Nothing matches. Search a concept, a token or a number such as #42."));
  };
  let pause = 0;
  const search = h("input", { type: "search", placeholder: "concept, token or #number", "aria-label": "Search latents by concept, token or number", oninput: (e) => { state.query = e.target.value; clearTimeout(pause); pause = setTimeout(update, 80); } });
  const sort = h("select", { onchange: (e) => { state.by = e.target.value; update(); } }, SORTS.filter(([c]) => c === "id" || latents.table[c]).map(([c, name]) => h("option", { value: c, selected: c === state.by }, name)));
  const alive = h("input", { type: "checkbox", onchange: (e) => { state.alive = e.target.checked; update(); } });
  let dead = 0;
  for (const v of latents.table.density) if (!(v > 0)) dead++;
  update();
  return h("div", { class: "panel" },
    h("div", { class: "summary" }, h("p", {}, `${latents.method} at ${latents.site}: ${index.n.toLocaleString("en")} latents, ${dead.toLocaleString("en")} never active on the text read (${percent(dead / Math.max(1, index.n))}).`), densityChart(latents.table.density)),
    h("div", { class: "controls" }, search, h("label", { class: "choose" }, h("span", {}, "Sort by"), sort), h("label", { class: "choose" }, alive, h("span", {}, "active only")), count),
    h("div", { class: "browser" }, h("div", { class: "pane" }, h("div", { class: "row head", "aria-hidden": "true" }, h("span", {}, "latent"), h("span", {}, "concept"), h("span", { class: "n" }, "density"), h("span", { class: "n" }, "F1")), list.view), page));
}
