"""The command line. Each command reads its options, then hands over to `rarefy.jobs`; torch is imported only then.

Exit codes: 0 done, 1 a check found damage or rarefy itself failed, 2 the request cannot be served, 130 and 143 ended by
SIGINT and SIGTERM. Whatever stops a command is said in one line on standard error; results go to standard output, and
with --json nothing else does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_exchange import add_exchange
from .cli_latents import add_latents
from .cli_options import AsJson, BatchSize, Context, Data, K, Model, Out, Rate, Seed, Settings, Site, Tokens, Width
from .cli_patterns import add_patterns
from .errors import BadInput, printable
from .jobs.ending import guarded

app = typer.Typer(
    name="rarefy", add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="One instrument for sparsity in neural networks: make any part of a model sparse, and see what was kept and what was saved.",
)
MOST_BUDGETS = 200


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand after the command too.")] = False) -> None:
    """--debug may stand anywhere; it is taken off the command line before this is read."""


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of the dictionary.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Open the built-in model, make it sparse in four ways, judge each and write report.html."""
    from .jobs.demo import demo as run

    _print(run(out, steps=steps, screen=_screen(as_json)), as_json, out)


@app.command()
def fit(
    methods: Annotated[str, typer.Argument(help="Method names separated by commas, such as latents/topk; see `rarefy methods`.")],
    model: Model,
    site: Site = "",
    data: Data = "stdlib",
    out: Out = Path("runs/fit"),
    width: Width = 4096,
    k: K = None,
    budget: Annotated[
        float | None, typer.Option(help="Fraction of units kept; default 0.5. Of latents, given instead of --k, it is k / width.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch: BatchSize = 2048,
    lr: Rate = 0.0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    context: Context = 512,
    tokens: Tokens = 400_000,
    seed: Seed = 0,
    target: Annotated[str, typer.Option(help="Site to reproduce, for transcoders; default the site read. Several, as for --site.")] = "",
    join: Annotated[
        str, typer.Option(help="Several sites (commas, globs): concat reads all as one row (crosscoder), mix each as a row of its own (multi-layer).")
    ] = "",
    beside: Annotated[str, typer.Option(help="A second model, read at the same sites, for a crosscoder of two models (with --join concat).")] = "",
    store: Annotated[bool, typer.Option(help="Keep the activations on disk under OUT and train from there.")] = False,
    objective: Annotated[
        str, typer.Option(help="Train on: local, the activation; e2e, the model's output when spliced in; e2e+downstream, later layers too.")
    ] = "local",
    downstream: Annotated[float | None, typer.Option(help="Weight of later layers in e2e+downstream; default 1.")] = None,
    resume_from: Annotated[
        str, typer.Option(help="A finished run, one of its methods/ folders, or another library's dictionary, to be trained on.")
    ] = "",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train or calibrate methods on a model's activations. A run found in OUT goes on where it stopped."""
    from .jobs.fit import FitRequest
    from .jobs.fit import fit as run
    from .world import first, joined

    request = FitRequest(
        methods=_names(methods), model=model, site=site, data=data, out=out, width=width, k=k, budget=budget, steps=steps,
        batch=batch, lr=lr, precision=precision, context=context, tokens=tokens, seed=seed, target=target, join=join, beside=beside, store=store,
        objective=objective, downstream=downstream, resume_from=resume_from, settings=_settings(settings),
    )
    with joined():
        result = run(request, screen=_screen(as_json))
        if first():
            _print(result, as_json, out)


@app.command()
def judge(
    runs: Annotated[list[str], typer.Argument(help="A run folder made by `rarefy fit`; with --suite planted, phase or othello, method names.")],
    against: Annotated[str, typer.Option(help="What to compare with: dense, or method names, separated by commas.")] = "dense",
    data: Data = "",
    tokens: Annotated[int | None, typer.Option(help="Most tokens to judge on; 0 reads all. Default 20,000, with --suite latents 60,000.")] = None,
    suite: Annotated[
        str, typer.Option(help="latents: runs on concepts of Python. Methods: planted, on known features; phase, at many L0; othello, on a board.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of a suite; what is there is kept, and an interrupted suite goes on.")] = Path("runs/suite"),
    kinds: Annotated[str, typer.Option(help="Kinds of planted data, separated by commas; default all.")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds a method, for a suite.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps, for a suite.")] = 1500,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Judge a fitted run on held-out text: fidelity, cost and intervals over documents. Or, with --suite, methods on known ground truth."""
    if suite == "latents":
        from .jobs.latent_suite import TOKENS, judge_latents

        folders, tokens = [Path(run) for run in runs], TOKENS if tokens is None else tokens
        _print(judge_latents(folders, data=data, tokens=tokens, out=out, screen=_screen(as_json)), as_json, out)
        return
    if suite == "othello":
        from .jobs.suite_othello import OthelloRequest, othello

        request = OthelloRequest([name for given in runs for name in _names(given)], out, seeds=seeds, steps=steps, settings=_settings(settings))
        _print(othello(request, screen=_screen(as_json)), as_json, out)
        return
    if suite:
        from .jobs.suite import SuiteRequest
        from .jobs.suite import suite as run_suite

        names = [name for given in runs for name in _names(given)]
        wanted = SuiteRequest(names, out, suite=suite, kinds=_names(kinds), seeds=seeds, steps=steps, settings=_settings(settings))
        _print(run_suite(wanted, screen=_screen(as_json)), as_json, out)
        return
    from .jobs.judge import judge as job

    if len(runs) != 1:
        raise BadInput(f"judge takes one run folder, not {len(runs)}; with --suite planted, methods")
    run = Path(runs[0])
    _print(job(run, _names(against), data=data, tokens=20_000 if tokens is None else tokens, screen=_screen(as_json)), as_json, run)


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A run folder made by `rarefy fit`.")],
    out: Out = Path("runs/convert"),
    method: Annotated[str, typer.Option(help="Which of the run's methods; default its only one that ranks latents.")] = "",
    tokens: Annotated[int, typer.Option(help="Most tokens of the fitted text to set the threshold on.")] = 20_000,
    as_json: AsJson = False,
) -> None:
    """Turn a TopK-like dictionary into a JumpReLU one that is as sparse: one threshold in place of the k largest."""
    from .jobs.convert import convert as job

    _print(job(run, out, method=method, tokens=tokens, screen=_screen(as_json)), as_json, out)


@app.command()
def sweep(
    methods: Annotated[str, typer.Argument(help="Method names separated by commas.")],
    model: Model,
    budget: Annotated[str, typer.Option(help="Budgets: LOW:HIGH (five steps), LOW:HIGH:STEP, or a list 0.3,0.5.")] = "0.3:0.9",
    site: Site = "",
    data: Data = "stdlib",
    out: Out = Path("runs/sweep"),
    context: Context = 512,
    tokens: Tokens = 20_000,
    calibration: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 20_000,
    suite: Annotated[str, typer.Option(help="attention: methods, patterns and cache policies on recall, aggregation and text, by phase.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks of the suite, separated by commas; default all.")] = "",
    phases: Annotated[str, typer.Option(help="prefill, decode or both, for the suite.")] = "prefill,decode",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence, separated by commas, for the suite.")] = "256,512",
    sequences: Annotated[int, typer.Option(help="Sequences a task, for the suite.")] = 16,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure methods at several budgets: one frontier, kept in OUT; a sweep found there goes on. With --suite attention, by task and phase."""
    if suite:
        from .cli_attention import run_suite

        result = run_suite(
            suite, methods=methods, model=model, budgets=_budgets(budget), out=out, tasks=_names(tasks), phases=_names(phases),
            lengths=_names(lengths), sequences=sequences, data=data, tokens=tokens, settings=_settings(settings), screen=_screen(as_json),
        )
        _print(result, as_json, out)
        return
    from .jobs.sweep import SweepRequest
    from .jobs.sweep import sweep as run

    request = SweepRequest(
        methods=_names(methods), model=model, budgets=_budgets(budget), site=site, data=data, out=out, context=context,
        tokens=tokens, calibration=calibration, settings=_settings(settings),
    )
    _print(run(request, screen=_screen(as_json)), as_json, out)


@app.command("apply")
def apply_(
    method: Annotated[str, typer.Argument(help="A weights method, such as weights/wanda.")],
    model: Model,
    out: Out,
    budget: Annotated[float, typer.Option(help="Fraction of weights kept.")] = 0.5,
    site: Site = "layers.*.*_proj",
    share: Annotated[str, typer.Option(help="How layers share the budget: uniform, erk or owl.")] = "uniform",
    data: Data = "stdlib",
    context: Context = 512,
    calibration: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 20_000,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it as a folder that plain transformers loads."""
    from .jobs.apply import ApplyRequest
    from .jobs.apply import apply as run

    request = ApplyRequest(
        method=method, model=model, out=out, budget=budget, site=site, share=share, data=data, context=context,
        calibration=calibration, settings=_settings(settings),
    )
    _print(run(request, screen=_screen(as_json)), as_json, out)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Names to show in full, with what was measured of their papers' claims.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every method, pattern, cache policy, map and task, or show the cards of some in full."""
    from .catalogue import CARDS, card, claims, in_full

    shown = [card(name) for name in names] if names else list(CARDS)
    if as_json:
        from dataclasses import asdict

        typer.echo(_dumps({"schema": 1, "methods": [{**asdict(e), "claims": [asdict(c) for c in claims(e.name)]} for e in shown]}))
        return
    if names:
        typer.echo("\n\n".join(in_full(e) for e in shown))
        return
    wide = max(len(e.name) for e in CARDS)
    for e in CARDS:
        typer.echo(f"{e.name:{wide}} {e.kind:8} {e.unit:12} {e.fitted:11} {e.year}  {e.title}")


@app.command()
def sites(
    model: Model,
    pattern: Annotated[str, typer.Argument(help="Name or glob.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the places of a model where a method can be put."""
    from .jobs.models import list_sites

    found = list_sites(model, pattern)
    if as_json:
        typer.echo(_dumps({"schema": 1, "sites": found}))
        return
    for s in found:
        typer.echo(f"{s['name']:28} {s['kind']:10} {s['d']:>6}  {s['module']}")


@app.command()
def groups(
    model: Model,
    count: Annotated[int, typer.Option("--groups", help="How many groups to make.")] = 3,
    site: Site = "layers.*.resid_post",
    linkage: Annotated[str, typer.Option(help="Distance of two groups: complete, average or single.")] = "complete",
    data: Data = "stdlib",
    context: Context = 512,
    tokens: Tokens = 20_000,
    as_json: AsJson = False,
) -> None:
    """Group neighbouring layers by the angles between their activations, each group for one dictionary (`fit --join mix`)."""
    from .jobs.groups import groups as run

    _print(run(model, site, count, linkage=linkage, data=data, context=context, tokens=tokens, screen=_screen(as_json)), as_json, Path())


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run folder that holds report.json.")],
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8765,
    host: Annotated[str, typer.Option(help="Address to bind; other than 127.0.0.1 needs --token.")] = "127.0.0.1",
    token: Annotated[str, typer.Option(help="Secret that visitors must give, for --host.")] = "",
    export: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file instead of serving.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a run's page, to this machine only, until interrupted; or write it as one file."""
    from .jobs.report import show as run_page

    def say(what: str, where: str) -> None:
        line = f"wrote {where}" if what == "page" else f"{run} is at {where}; Ctrl-C ends"
        typer.echo(_dumps({"schema": 1, what: where}) if as_json else printable(line))

    run_page(run, port=port, host=host, token=token, export=export, say=say)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A run folder, an activation store, or a folder of them.")],
    as_json: AsJson = False,
) -> None:
    """Verify every checksum, manifest and file of a run or store."""
    from .store.check import check as verify

    report = verify(path)
    if as_json:
        typer.echo(_dumps({"schema": 1, "ok": report.ok, "checked": report.checked, "problems": report.problems}))
    else:
        for problem in report.problems:
            typer.echo(printable(f"damaged: {problem}"))
        typer.echo(f"{len(report.checked)} checked, {len(report.problems)} damaged")
    if not report.ok:
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadInput(f"--set {pair!r}: write name=value")
        if name in out:
            raise BadInput(f"--set {name} is given twice; give each setting once")
        try:
            out[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            out[name] = value
    return out


def _budgets(text: str) -> list[float]:
    form = f"--budget {text!r}: write LOW:HIGH, LOW:HIGH:STEP or a list such as 0.3,0.5"
    ranged = ":" in text
    try:
        parts = [float(part) for part in (text.split(":") if ranged else _names(text))]
    except ValueError:
        raise BadInput(form) from None
    if not parts or (ranged and len(parts) > 3):
        raise BadInput(form)
    if not all(0 < part <= 1 for part in parts):
        raise BadInput(f"--budget {text!r}: every budget, and the step, must be in (0, 1]; it is the fraction of units kept")
    if not ranged:
        return sorted({round(part, 6) for part in parts})
    low, high = parts[:2]
    if low > high:
        raise BadInput(f"--budget {text!r}: {low:g} is more than {high:g}; the lower comes first")
    step = parts[2] if len(parts) == 3 else (high - low) / 4
    count = math.floor((high - low) / step + 1e-9) + 1 if step else 1
    if count > MOST_BUDGETS:
        raise BadInput(f"--budget {text!r}: that is {count} budgets; take at most {MOST_BUDGETS}")
    return [round(low + i * step, 6) for i in range(count)]


def _screen(quiet: bool) -> Any:
    from .jobs.screen import Screen

    return Screen(quiet=quiet)


def _dumps(record: Any) -> str:
    return json.dumps(record, indent=1, allow_nan=False)


def _print(result: Any, as_json: bool, out: Path) -> None:
    if as_json:
        typer.echo(_dumps(result.as_json()))
    else:
        result.show(out)


add_exchange(app, _screen, _print)
add_latents(app, _screen, _print, _settings)
add_patterns(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(app, [a for a in arguments if a != "--debug"], debug="--debug" in arguments)
