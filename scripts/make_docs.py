"""Bring the generated parts of the README up to date.

    python scripts/make_docs.py                  # the table of methods, from the catalogue
    python scripts/make_docs.py --run runs/demo  # also the picture and the figures, from a finished demo
"""
import argparse
import json
import subprocess
from pathlib import Path

from rarefy.catalogue import ENTRIES
from rarefy.plots import overview_svg
from rarefy.ui import read_report

ROOT = Path(__file__).parents[1]


def between(text: str, name: str, inside: str) -> str:
    """`text` with what stands between its <!-- name --> markers replaced."""
    head, start, rest = text.partition(f"<!-- {name} -->\n")
    _, stop, tail = rest.partition(f"<!-- /{name} -->")
    assert start and stop, f"README.md has no <!-- {name} --> markers"
    return head + start + inside + stop + tail


def methods() -> str:
    """The catalogue as a table."""
    rows = ["| method | selects | fitted | year | source |", "|---|---|---|---|---|"]
    for e in ENTRIES:
        title = f"[{e.title}]({e.link})" if e.link else e.title
        rows.append(f"| `{e.name}` | {e.unit}s | {e.fitted} | {e.year} | {title} |")
    return "\n".join(rows) + "\n"


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


if __name__ == "__main__":
    main()
