"""`rarefy draw`: a pattern of attention as a picture, with its density and cost; `rarefy.cli` adds it to the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import AsJson
from .errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from .attention.patterns import Pattern

Expression = Annotated[str, typer.Argument(help="An expression such as 'window(8) | sinks(2)', or a card's name, such as patterns/bigbird.")]
Length = Annotated[int, typer.Option(help="Positions of the sequence.")]
Heads = Annotated[int | None, typer.Option(help="Heads; default 1, of a card its own.")]
Layers = Annotated[int | None, typer.Option(help="Layers; default 1, of a card its own.")]
Causal = Annotated[bool | None, typer.Option("--causal/--both-ways", help="Whether keys ahead are hidden; default yes, of a card its own.")]
Block = Annotated[int | None, typer.Option(help="Queries and keys in a block, for the cost of whole blocks; default 16, of long sequences 64.")]
Bind = Annotated[list[str] | None, typer.Option(help="Metadata, name=0,0,1,1,...; pairs and sets as 0:1,2:5. May be repeated.")]
Picture = Annotated[Path | None, typer.Option(help="SVG file to write; without it the pattern is drawn in the terminal.")]
MOST_DRAWN, SHORT, LONGEST, COLUMNS = 4, 8192, 1 << 20, 64


def add_patterns(app: typer.Typer) -> None:
    """Add `draw`."""

    @app.command()
    def draw(
        pattern: Expression, length: Length = 64, heads: Heads = None, layers: Layers = None, causal: Causal = None, block: Block = None,
        bind: Bind = None, out: Picture = None, as_json: AsJson = False,
    ) -> None:
        """Draw a pattern of attention, with its exact density and counted cost."""
        block = (16 if length <= SHORT else 64) if block is None else block
        _draw(pattern, length, heads, layers, causal, block, bind or [], out, as_json)


def _draw(
    text: str, length: int, heads: int | None, layers: int | None, causal: bool | None, block: int, bind: list[str], out: Path | None, as_json: bool,
) -> None:
    from .attention.patterns import parse
    from .attention.patterns.draw import panels, svg, terminal
    from .attention.patterns.zoo import EXAMPLES
    from .catalogue import card
    from .method import positive
    from .store.atomic import write_atomic

    positive("length", length, LONGEST)
    made, tables, example = None, _bound(bind), None
    if text.startswith("patterns/"):
        example = EXAMPLES.get(card(text).name.removeprefix("patterns/"))
        if example is None:
            raise BadInput(f"{text} has no example laid out; write its expression: {card(text).note}")
        if length < 64:
            raise BadInput(f"{text} is laid out for lengths of 64 and more, not {length}; write its expression for shorter ones")
        made, tables = example.at(length), {**example.tables(length), **tables}
    made = made or parse(text)
    heads = positive("heads", (example.heads if example else 1) if heads is None else heads)
    layers = positive("layers", (example.layers if example else 1) if layers is None else layers)
    causal = (example.causal if example else True) if causal is None else causal
    result = _counted(made, length, heads, layers, causal, block, tables)
    if out is not None:
        write_atomic(out, svg(made, length, heads=heads, layers=layers, causal=causal, tables=tables).encode())
        result["picture"] = str(out)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{made}\n")
    shown = panels(made, heads, layers)
    for panel in shown[:MOST_DRAWN] if out is None else []:
        cell = -(-length // COLUMNS)                      # a block a character, so that no full matrix is formed
        blocks = panel.one.block_mask(length, length, block=cell, query_block=cell, causal=causal, tables=tables).blocks
        drawn = terminal(blocks[0, 0], COLUMNS)
        typer.echo((f"{panel.title}\n" if panel.title else "") + drawn + "\n")
    if out is None and len(shown) > MOST_DRAWN:
        typer.echo(f"and {len(shown) - MOST_DRAWN} more\n")
    typer.echo(f"density {result['density']:.4%} of {'causal' if causal else 'all'} pairs at {length} positions, "
               f"{result['block_density']:.4%} in whole blocks of {block}")
    typer.echo(f"a query and head: {result['pairs']:.1f} pairs, {result['flops_per_width']:.1f} x width flops, "
               f"{result['block_flops_per_width']:.1f} x width in whole blocks")
    if out is not None:
        typer.echo(f"wrote {out}")


def _counted(
    made: Pattern, length: int, heads: int, layers: int, causal: bool, block: int, tables: dict[str, Tensor]
) -> dict[str, Any]:
    """Means over layers and heads."""
    density = pairs = whole = 0.0
    for layer in range(layers):
        density += made.density(length, causal=causal, heads=heads, layer=layer, tables=tables, block=block) / layers
        fine, coarse = made.cost(length, width=1, heads=heads, block=block, causal=causal, layer=layer, tables=tables)
        pairs, whole = pairs + fine.flops / heads / layers, whole + coarse.flops / heads / layers
    return {
        "schema": 1, "pattern": str(made), "length": length, "heads": heads, "layers": layers, "causal": causal, "block": block, "density": density,
        "block_density": whole / _whole_blocks(length, block, causal), "pairs": pairs / 4, "flops_per_width": pairs, "block_flops_per_width": whole,
    }


def _whole_blocks(length: int, block: int, causal: bool) -> float:
    """Flops a query, head and width of dense attention in whole blocks."""
    n = -(-length // block)
    return 4 * (n * (n + 1) / 2 if causal else n * n) * block * block / length


def _bound(pairs: list[str]) -> dict[str, Tensor]:
    import torch

    out: dict[str, Tensor] = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        try:
            rows = [[int(n) for n in row.split(":")] for row in values.split(",")]
            out[name] = torch.tensor([row[0] for row in rows] if ":" not in values else rows)
        except ValueError:
            rows = []
        if not (equals and name and rows):
            raise BadInput(f"--bind {pair[:60]!r}: write name=0,0,1,1 for labels, name=0:1,2:5 for pairs")
    return out
