"""Bring the generated parts of the README and docs/methods.md up to date.

    python scripts/make_docs.py                  # the tables of methods, from the catalogue
    python scripts/make_docs.py --run runs/demo  # also the picture and the figures, from a finished demo
"""
import argparse
import json
import subprocess
from pathlib import Path

from rarefy.catalogue import CARDS, Entry
from rarefy.plots import overview_svg
from rarefy.ui import read_report

ROOT = Path(__file__).parents[1]


def between(text: str, name: str, inside: str) -> str:
    """`text` with what stands between its <!-- name --> markers replaced."""
    head, start, rest = text.partition(f"<!-- {name} -->\n")
    _, stop, tail = rest.partition(f"<!-- /{name} -->")
    assert start and stop, f"README.md has no <!-- {name} --> markers"
    return head + start + inside + stop + tail


FAMILIES = {
    "latents": ("Dictionaries", "[a page each](docs/latents/)"),
    "coding": ("Sparse coding", "[coding](docs/coding.md)"),
    "weights": ("Weights", ""),
    "neurons": ("Neurons", ""),
    "attention": (
        "Attention", "[static](docs/patterns.md), [dynamic](docs/dynamic-attention.md), [trained](docs/trained-attention.md), "
        "[structured](docs/structured-attention.md)"),
    "patterns": ("Attention patterns", "[gallery](docs/patterns.md)"),
    "layers": ("Layers", "[structured](docs/structured-attention.md)"),
    "kernels": ("Kernels", "[structured](docs/structured-attention.md)"),
    "cache": ("KV cache", "[policies](docs/kv-cache.md)"),
    "maps": ("Maps to probabilities", "[maps](docs/maps.md)"),
    "tasks": ("Tasks and evaluations", "[suite](docs/attention-suite.md)"),
}


def families() -> dict[str, list[Entry]]:
    """Cards by the first part of their name, in the order of FAMILIES."""
    found: dict[str, list[Entry]] = {name: [] for name in FAMILIES}
    for card in CARDS:
        found.setdefault(card.name.split("/")[0], []).append(card)
    return {name: cards for name, cards in found.items() if cards}


def methods() -> str:
    """The catalogue in a row a family."""
    rows = ["| family | what there is | more |", "|---|---|---|"]
    for name, cards in families().items():
        title, more = FAMILIES.get(name, (name.capitalize(), ""))
        names = ", ".join(f"`{c.name.partition('/')[2]}`" for c in cards)
        rows.append(f"| {title} (`{name}/`, {len(cards)}) | {names} | {more} |")
    return "\n".join(rows) + "\n"


def table() -> str:
    """docs/methods.md: every card."""
    out = ["# Everything that has a card", "", "Made from the catalogue by `scripts/make_docs.py`; `rarefy methods --json` prints the same.", ""]
    for name, cards in families().items():
        title = FAMILIES.get(name, (name.capitalize(), ""))[0]
        out += [f"## {title}", "", "| name | selects | fitted | in place of | year | source |", "|---|---|---|---|---|---|"]
        for c in cards:
            title = f"[{c.title}]({c.link})" if c.link else c.title
            note = f" `{c.note}`" if c.kind == "pattern" and c.note else f" {c.note}" if c.note else ""
            note = note.replace("|", "\\|")
            out.append(f"| `{c.name}` | {c.unit}s | {c.fitted} | {c.replaces} | {c.year} | {title}.{note} |")
        out.append("")
    return "\n".join(out)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def results(report: dict) -> str:
    """The demo's figures, and where they come from."""
    lines = [f"- **{u.get('title') or u['unit'].capitalize()}.** {u['headline']}" for u in report["units"]]
    found = next((n for n in report["notes"] if "track one of" in n), "")
    if found:
        lines.append(f"- **Concepts.** {found}")
    made = report["made"]
    minutes, seconds = divmod(round(made["seconds"]), 60)
    lines += ["", f"Measured by `rarefy demo` on {made['machine']} in {minutes} min {seconds} s, code as of {commit()}; "
              "nats are of cross-entropy a token, on held-out files of the standard library."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="a finished demo's folder")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = between(readme.read_text(encoding="utf-8"), "methods", methods())
    if args.run:
        report = read_report(args.run)
        text = between(text, "results", results(report))
        picture = ROOT / "docs/pictures/demo.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(overview_svg(report["units"]), encoding="utf-8")
        (picture.parent / "demo.json").write_text(json.dumps({"units": report["units"], "made": report["made"]}, indent=1), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")
    (ROOT / "docs/methods.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
