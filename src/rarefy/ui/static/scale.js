// Maps numbers to pixels: linear, log, and asinh (linear near zero, log beyond) for quantities that reach zero.
export function niceTicks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? 10 * power;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(Number((i * step).toPrecision(12)));
  return out;
}

function decadeTicks(low, high) {
  const out = low <= 0 && high >= 0 ? [0] : [];
  for (let e = -12; e <= 15; e++)
    for (const m of [1, 2, 5]) for (const sign of [-1, 1]) out.push(sign * Number((m * 10 ** e).toPrecision(3)));
  return out.filter((v) => v >= low && v <= high).sort((a, b) => a - b);
}

function thin(ticks, at, gap) {
  const round = (v) => (v === 0 ? 3 : /^-?1(e|0*$)/.test(v.toExponential().replace(/\.0+e/, "e").split("e")[0]) ? 2 : 1);
  const kept = [];
  for (const rank of [3, 2, 1])
    for (const v of ticks) if (round(v) === rank && kept.every((k) => Math.abs(at(k) - at(v)) >= gap)) kept.push(v);
  return kept.sort((a, b) => a - b);
}

// kind: "linear", "log" or "asinh"; knee: where asinh turns from linear to log.
export function makeScale(kind, [low, high], [from, to], { knee = 1, gap = 44 } = {}) {
  if (!(high > low)) { high = low + (Math.abs(low) || 1) * 0.5; low -= (Math.abs(low) || 1) * 0.5; }
  const warp = kind === "log" ? Math.log : kind === "asinh" ? (v) => Math.asinh(v / knee) : (v) => v;
  const a = warp(low), b = warp(high);
  const at = (v) => from + ((warp(v) - a) / (b - a)) * (to - from);
  at.domain = [low, high];
  at.ticks = kind === "linear"
    ? niceTicks(low, high, Math.max(2, Math.abs(to - from) / (gap * 1.6)))
    : thin(decadeTicks(low, high), at, gap);
  if (kind !== "linear" && at.ticks.length < 2) at.ticks = niceTicks(low, high, 4);
  return at;
}
