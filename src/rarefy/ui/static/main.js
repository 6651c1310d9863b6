// Takes the report from the page itself (an exported file) or from the server, and draws it.
import { h } from "./dom.js";
import { renderPage } from "./page.js";

async function readReport() {
  const inside = document.getElementById("report");
  if (inside) return JSON.parse(inside.textContent);
  const reply = await fetch("/report.json", { credentials: "same-origin" });
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error ?? `the server answered ${reply.status}`);
  return body;
}

async function start() {
  const root = document.getElementById("page");
  try {
    renderPage(await readReport(), root);
  } catch (error) {
    root.replaceChildren(h("p", { class: "wait", role: "alert" }, "This report cannot be shown: " + error.message));
    throw error;
  }
}

start();
