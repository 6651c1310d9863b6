// Builds elements. Strings become text nodes and nothing else, so that no token, label or file name is ever parsed.
const SVG = "http://www.w3.org/2000/svg";
const LONGEST = 4000;
// C0/C1 controls but newline and tab, zero-width and bidirectional controls, lone surrogates, non-characters.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff]|\p{Cs}/gu;

const code = (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";

export function printable(value, longest = LONGEST) {
  const text = String(value);
  const cut = text.length > longest ? text.slice(0, longest) : text;
  const shown = cut.replace(UNSEEN, code);
  return cut === text ? shown : `${shown}… (${text.length.toLocaleString("en")} characters)`;
}

// A token with its white space made visible.
export function tokenText(value, longest = 80) {
  if (value === "") return "∅";
  return printable(value, longest).replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key === "href" && !String(value).startsWith("#")) throw new Error("links stay inside the page");
    else node.setAttribute(key, value === true ? "" : key === "class" || key === "id" ? value : printable(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(printable(child)));
  }
  return node;
}

export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

export function table(head, rows, caption) {
  const cell = (tag, value, i, scope) =>
    h(tag, { class: i > 0 && typeof value !== "object" && /^[-+−<]?[\d–]/.test(String(value)) ? "n" : null, scope }, value);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: i && rows.length && /^[-+−<]?[\d–]/.test(String(rows[0][i])) ? "n" : null }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((v, i) => cell(i ? "td" : "th", v, i, i ? null : "row")))))));
}

const undrawn = [];

// Draws to the element's width: first in drawNow(), once it stands in the page, then whenever the width changes,
// in a frame of its own so that drawing cannot feed the observer.
export function onWidth(node, draw) {
  let last = 0;
  const fit = () => {
    const width = node.clientWidth;
    if (width < 50 || Math.abs(width - last) <= 2) return;
    last = width;
    draw(width);
  };
  undrawn.push(fit);
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(node);
}

export const drawNow = () => undrawn.splice(0).forEach((fit) => fit());
