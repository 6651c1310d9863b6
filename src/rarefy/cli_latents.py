"""Commands that follow dictionaries through attention and through training; `rarefy.cli` adds them to the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import AsJson, BatchSize, Context, Data, K, Out, Rate, Seed, Settings, Site, Tokens, Width

Run = Annotated[Path, typer.Argument(help="A run of `rarefy fit latents/...` at layers.N.attn.z.")]
Latent = Annotated[list[int] | None, typer.Option(help="Latent to look at; may be repeated. Default: eight striking ones.")]
Places = Annotated[int, typer.Option(help="Strongest places shown of each latent.")]
Method = Annotated[str, typer.Argument(help="A dictionary method, such as latents/topk.")]
Models = Annotated[list[str], typer.Argument(help="Checkpoints of one model's training, in their order.")]
Steps = Annotated[int, typer.Option(help="Training steps at the first checkpoint.")]
LaterSteps = Annotated[int, typer.Option(help="Training steps at each later one, begun from the dictionary before.")]
Cold = Annotated[bool, typer.Option("--cold", help="Begin every dictionary anew, to compare.")]


def add_latents(
    app: typer.Typer, screen: Callable[[bool], Any], show: Callable[[Any, bool, Path], None],
    settings_of: Callable[[list[str] | None], dict[str, Any]],
) -> None:
    """Add `attribute` and `track`.

    Args:
        screen: makes the progress display, silent if told so. show: prints a result, as JSON or for people.
        settings_of: reads name=value pairs.
    """

    @app.command()
    def attribute(
        run: Run, latent: Latent = None, places: Places = 3, data: Data = "", tokens: Tokens = 20_000, as_json: AsJson = False,
    ) -> None:
        """Split what makes a latent of an attention output fire over heads and source tokens."""
        from .jobs.attribute import attribute_run

        show(attribute_run(run, latent or [], data=data, tokens=tokens, places=places, screen=screen(as_json)), as_json, run)

    @app.command()
    def track(
        method: Method, models: Models, site: Site = "", data: Data = "stdlib", out: Out = Path("runs/track"), width: Width = 4096,
        k: K = None, steps: Steps = 1000, later_steps: LaterSteps = 100, cold: Cold = False, batch: BatchSize = 2048, lr: Rate = 0.0,
        context: Context = 512, tokens: Tokens = 400_000, seed: Seed = 0, settings: Settings = None, as_json: AsJson = False,
    ) -> None:
        """Follow one dictionary over checkpoints of a model's training: how features form and drift. A series in OUT goes on."""
        from .jobs.track import TrackRequest
        from .jobs.track import track as job

        request = TrackRequest(
            method=method, models=models, out=out, site=site, data=data, width=width, k=k, steps=steps, later_steps=later_steps,
            cold=cold, batch=batch, lr=lr, context=context, tokens=tokens, seed=seed, settings=settings_of(settings),
        )
        show(job(request, screen=screen(as_json)), as_json, out)
