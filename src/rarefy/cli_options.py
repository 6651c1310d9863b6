"""Options that several commands have, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="`builtin`, a local Hugging Face folder, or a hub id such as org/name@revision.")]
Data = Annotated[str, typer.Option(help="Text: `stdlib`, a folder, a .txt/.py/.jsonl file, several separated by commas, or datasets:NAME.")]
Out = Annotated[Path, typer.Option(help="Folder to write; created if missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Site = Annotated[str, typer.Option(help="Site name or glob, such as layers.3.resid_post or 'layers.*.*_proj'; see `rarefy sites`.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A method's own argument, name=value; may be repeated.")]
Context = Annotated[int, typer.Option(help="Tokens in a context.")]
Tokens = Annotated[int, typer.Option(help="Most tokens to read from the data; 0 reads all.")]
Width = Annotated[int, typer.Option(help="Latents of a dictionary.")]
K = Annotated[int | None, typer.Option(help="Latents active a token, for methods that fix it; default 32.")]
BatchSize = Annotated[int, typer.Option(help="Tokens a training step.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate; 0 chooses by width.")]
Seed = Annotated[int, typer.Option(help="Seed of initialisation and data order.")]
