"""Commands that exchange dictionaries with other libraries; `rarefy.cli` adds them to the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import AsJson, Context, Model, Out

Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="A dictionary of SAELens, sparsify, dictionary_learning, Gemma Scope or circuit-tracer.")]
Run = Annotated[Path, typer.Argument(help="A run of `rarefy fit` with a dictionary, or one of its methods/ folders.")]
Format = Annotated[str, typer.Option("--format", help="saelens, saelens-v5, sparsify, dictionary_learning, gemma_scope or circuit-tracer.")]
Method = Annotated[str, typer.Option(help="Which dictionary, where the run has several.")]
Site = Annotated[str, typer.Option(help="Site it reads, in any words `rarefy sites` knows; default what its files say.")]
Target = Annotated[str, typer.Option(help="Site it reproduces, of transcoders; default what its files say.")]
Data = Annotated[str, typer.Option(help="Text to judge it on later, less what is held out of it; see `rarefy fit`.")]
Tokens = Annotated[int, typer.Option(help="Tokens of the text that are not judged on.")]


def add_exchange(app: typer.Typer, screen: Callable[[bool], Any], show: Callable[[Any, bool, Path], None]) -> None:
    """Add `export` and `import`.

    Args:
        screen: makes the progress display, silent if told so. show: prints a result, as JSON or for people.
    """

    @app.command()
    def export(run: Run, out: Out, format_: Format = "saelens", method: Method = "", as_json: AsJson = False) -> None:
        """Write a dictionary in another library's layout, for the same output there."""
        from .jobs.exchange import export as job

        show(job(run, format_, out, method, screen=screen(as_json)), as_json, out)

    @app.command("import")
    def import_(
        path: Path_, model: Model, site: Site = "", target: Target = "", data: Data = "stdlib", out: Out = Path("runs/import"),
        context: Context = 512, tokens: Tokens = 400_000, as_json: AsJson = False,
    ) -> None:
        """Make a run of a dictionary that another library trained; judge and show take it like one of ours."""
        from .jobs.exchange import ImportRequest
        from .jobs.exchange import import_ as job

        request = ImportRequest(path=path, model=model, site=site, target=target, data=data, out=out, context=context, tokens=tokens)
        show(job(request, screen=screen(as_json)), as_json, out)
