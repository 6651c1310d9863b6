// Numbers as people read them.
export const known = (v) => typeof v === "number" && Number.isFinite(v);

const superscript = (e) => String(e).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻");

export function num(v, digits = 3) {
  if (!known(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size >= 1e5) {
    const step = Math.min(4, Math.floor(Math.log10(size) / 3));
    return (v / 10 ** (3 * step)).toPrecision(3).replace(/\.?0+$/, (m) => (m.includes(".") ? "" : m)) + ["", " k", " M", " G", " T"][step];
  }
  if (size >= 1000) return Math.round(v).toLocaleString("en");
  if (size < 1e-3) return v.toExponential(1).replace(/\.0?(?=e)|e([+-]\d+)/g, (m, e) => (e ? "×10" + superscript(Number(e)) : ""));
  return String(Number(v.toPrecision(digits)));
}

export const percent = (v) => (known(v) ? (v !== 0 && Math.abs(v) < 0.001 ? num(v * 100, 2) : Number((v * 100).toPrecision(3))) + " %" : "–");
export const bytes = (v) => {
  if (!known(v)) return "–";
  const step = v < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(v) / 10));
  return Number((v / 1024 ** step).toPrecision(3)) + ["\u00a0B", "\u00a0KiB", "\u00a0MiB", "\u00a0GiB", "\u00a0TiB"][step];
};
export const seconds = (v) => {
  if (!known(v)) return "–";
  if (v < 1) return Math.round(v * 1000) + "\u00a0ms";
  if (v < 60) return Number(v.toPrecision(3)) + "\u00a0s";
  if (v < 3600) return Math.floor(v / 60) + "\u00a0min " + Math.round(v % 60) + "\u00a0s";
  return Math.floor(v / 3600) + "\u00a0h " + Math.round((v % 3600) / 60) + "\u00a0min";
};
export const interval = (m) => (!m || !known(m.mean) ? "–" : num(m.mean) + (known(m.low) && known(m.high) ? ` [${num(m.low)}, ${num(m.high)}]` : ""));
export const times = (dense, sparse) => (known(dense) && known(sparse) && sparse > 0 ? Number((dense / sparse).toPrecision(3)) + "×" : "–");

const NAMES = {
  ce_increase: "cross-entropy increase (nats)", ce: "cross-entropy (nats)", kl: "KL from dense (nats)", top1: "top-1 agreement",
  fvu: "fraction of variance unexplained", loss_recovered: "loss recovered", l0: "active latents a token", density: "density (units kept)",
  budget: "budget (asked for)", flops: "FLOPs, fraction of dense", bytes: "bytes, fraction of dense", ms: "time, fraction of dense",
  loss: "loss", dead: "dead latents", tokens_per_s: "tokens a second", accuracy: "accuracy",
  probe_1: "probe on 1 latent: accuracy", probe_2: "probe on 2 latents: accuracy", probe_5: "probe on 5 latents: accuracy", match_f1: "F1 of each concept's best latent",
  absorption: "absorption of first letters", absorption_kinds: "absorption of token kinds", splits: "latents a letter is split over",
  removal: "spurious correlation removed", perturbation: "targeted perturbation", senses: "senses told apart: accuracy", senses_f1: "senses told apart: F1",
  control: "control with 2 codes a row", unlearn_selective: "unlearning: loss gained there less elsewhere", unlearn_forget: "unlearning: loss gained there (nats)",
  unlearn_damage: "unlearning: loss gained elsewhere (nats)", loss_recovered_mean: "loss recovered, from the mean",
};
export const metricName = (key) => NAMES[key] ?? key.replaceAll("_", " ");
const HIGH = new Set(["top1", "loss_recovered", "accuracy", "f1", "precision", "recall", "explained_variance", "cosine",
  "loss_recovered_mean", "probe_1", "probe_2", "probe_5", "match_f1", "removal", "perturbation", "disentanglement", "cause", "isolation", "control",
  "senses", "senses_f1", "unlearn_selective", "unlearn_forget"]);
export const better = (key) => (HIGH.has(key) ? "high" : "low");
