"""Makes docs/patterns.md and its pictures: every pattern of the zoo with expression, density at 1k and 16k, and paper; and what recall loses.

    python scripts/draw_patterns.py [NAME ...]     only these pictures; the page always
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rarefy import catalogue
from rarefy.attention.patterns.draw import svg
from rarefy.attention.patterns.zoo import EXAMPLES, documents, pictures, points, text

ROOT = Path(__file__).resolve().parents[1]
PICTURES, PAGE = ROOT / "docs/pictures/patterns", ROOT / "docs/patterns.md"
DENSITIES, RECALL = PICTURES / "densities.json", PICTURES / "recall.json"
DOMAINS = (("Text", text), ("Pictures and videos", pictures), ("Graphs and points", points), ("Tables, documents, threads", documents))
LENGTHS = (1024, 16384)
INTRODUCTION = """# Static patterns

Made by `scripts/draw_patterns.py`. A pattern says which (query, key) pairs attention may look at, by position or metadata alone:

```python
import rarefy
from rarefy.attention.pattern import PatternAttention

model, tokenizer, _ = rarefy.open_model("builtin")
method = PatternAttention(pattern="window(256) | sinks(4) | blocks(64, random(2, past=True))")
with rarefy.replaced(model, {"layers.*.attn": method}):
    model.generate(**tokenizer("def read(path):\n", return_tensors="pt"), max_new_tokens=30)
```

Words combine with `|`, `&` and `~`; `heads(a, b)`, `layers(a, b)`, `on_heads([...], a, b)` and `on_layers([...], a, b)` give heads and layers
different ones; `blocks(64, p)`, `parts(4, p)`, `on(axis, shape, p)` and `by("label", p)` lay a pattern over blocks, equal parts, an axis of a grid or
metadata. Metadata comes in tensors: `with method.bind(row=row, column=column): ...`. `str(pattern)` is an expression that `parse` reads back.

`rarefy draw 'window(16) | sinks(2)'` draws one in the terminal, `--out FILE.svg` as a picture; `rarefy draw patterns/bigbird` takes one from below.
`rarefy sweep 'window(64) | sinks(4),attention/quest' builtin --suite attention` judges one [beside methods](attention-suite.md).

| word | keys that a query sees |
|---|---|
"""
GALLERY = """
Each word compiles to a block mask without the full matrix; tiles that look the same are evaluated once. Pairs are counted exactly.

Pictures are of 64 positions: rows are queries, columns keys, shaded what causality hides; members of a union have a colour each. Densities
are of the sizes named, with the pattern's sizes fitted to them, over all heads and layers; causal ones are of causal pairs.
"""


def densities(name: str) -> list[float]:
    """At each of LENGTHS, over layers."""
    one, out = EXAMPLES[name], []
    for length in LENGTHS:
        at, tables = one.at(length), one.tables(length)
        per_layer = [at.density(length, causal=one.causal, heads=one.heads, layer=n, tables=tables) for n in range(one.layers)]
        out.append(sum(per_layer) / len(per_layer))
    return out


ASKED = (
    "full()", "window(16) | sinks(4)", "window(64) | sinks(4)", "window(128) | sinks(4)",
    "blocks(8, window(2) | keys(0) | random(1, past=True))", "blocks(8, window(2) | keys(0) | random(4, past=True))",
    "window(2) | strided(8)", "window(2) | strided(2)", "sparse_transformer(16)", "s2(8, 1, 8)", "s2(8, 1, 2)",
    "window(80) | sinks(4)", "on_layers([1], full(), window(8) | sinks(4))", "on_layers([0], full(), window(8) | sinks(4))",
)
RECALLED = """## What static patterns lose

The recall model (two layers, four heads, trained dense; 256 tokens) under patterns it was not trained for: accuracy on 32 key-value pairs asked
for again after 128 tokens, and on one needle anywhere. A pattern fixed beforehand keeps about as many needles as keys. Of the two layers the
second looks keys up, the first only looks one token back; a stack that leaves the second one full keeps all at the density at which windows
everywhere lose most (as MASFormer and LongGen say), and one that leaves the first full keeps nothing: which layers are full matters more than
how many.

| pattern | density | key-value | needle |
|---|---|---|---|
"""


def recall() -> list[tuple[str, float, float, float]]:
    """(pattern, density, key-value accuracy, needle accuracy) of ASKED."""
    from rarefy.attention.pattern import PatternAttention
    from rarefy.builtin.model import recall_model
    from rarefy.site import replaced
    from rarefy.tasks.recall import FILLER, KEYS, VALUES, key_value, needle, recall_accuracy

    model, out = recall_model(), []
    tasks = key_value(KEYS, VALUES, 32, 24, filler=FILLER, gap=128, seed=9), needle(KEYS, VALUES, FILLER, 256, 192, seed=9)
    for pattern in ASKED:
        method = PatternAttention(pattern=pattern, block=16, query_block=16)
        with replaced(model, {"layers.*.attn": method}):
            pairs, found = (recall_accuracy(model, task).mean for task in tasks)
        out.append((pattern, method.measured_density(), pairs, found))
        print(*out[-1], flush=True)
    return out


def words() -> list[str]:
    """A row of the table for each word that is no paper's pattern."""
    import inspect

    from rarefy.attention.patterns import WORDS

    rows = []
    for name, make in WORDS.items():
        if ".zoo." not in make.__module__:
            takes = ", ".join(str(p).split(":")[0] + (f"={p.default!r}" if p.default is not p.empty else "")
                              for p in inspect.signature(make).parameters.values())
            rows.append(f"| `{name}({takes})` | {(make.__doc__ or '').splitlines()[0]} |".replace("arXiv ", "arXiv&nbsp;"))
    return rows


def main(names: list[str]) -> None:
    """Pictures, densities, page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    known = json.loads(DENSITIES.read_text(encoding="utf-8")) if DENSITIES.is_file() else {}
    cards = {card.name.removeprefix("patterns/"): card for card in catalogue.CARDS if card.kind == "pattern"}
    for name in names or EXAMPLES:
        one = EXAMPLES[name]
        picture = svg(one.at(64), 64, heads=one.heads, layers=one.layers, causal=one.causal, tables=one.tables(64))
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
        known[name] = densities(name)
        print(name, *(f"{d:.4f}" for d in known[name]), flush=True)
    if not names or not RECALL.is_file():
        RECALL.write_text(json.dumps(recall(), indent=1) + "\n", encoding="utf-8")
    DENSITIES.write_text(json.dumps({name: known[name] for name in sorted(known)}, indent=1) + "\n", encoding="utf-8")
    page = [INTRODUCTION + "\n".join(words()), GALLERY]
    for title, module in DOMAINS:
        page.append(f"## {title}\n")
        for one in module.EXAMPLES:
            card, (short, long) = cards[one.name], known[one.name]
            expression, _, remark = card.note.partition("; ")
            page.append(
                f"### {one.name}\n\n[{card.title}]({card.link}), {card.year}{'. ' + remark[0].upper() + remark[1:] if remark else ''}.\n\n"
                f"`{expression}`\n\n![{one.name}](pictures/patterns/{one.name}.svg)\n\nDensity {short:.2%} at 1k, {long:.2%} at 16k.\n"
            )
    rows = [f"| `{p.replace('|', chr(92) + '|')}` | {d:.2f} | {a:.2f} | {b:.2f} |" for p, d, a, b in json.loads(RECALL.read_text(encoding="utf-8"))]
    page.append(RECALLED + "\n".join(rows) + "\n")
    PAGE.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
