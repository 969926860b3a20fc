"""The command line: arguments to one call of `lilliput.api`, its answer to a table or to one JSON object."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lilliput.cli import convert as converting
from lilliput.cli import mask as masking
from lilliput.cli import measure, metrics
from lilliput.cli import merge as merging
from lilliput.cli import serve as serving
from lilliput.cli.command import answer, dump, guarded, plain, redirected, write
from lilliput.cli.convert import ToOpt
from lilliput.cli.options import HtmlOpt, Job, JsonOpt, MemoryOpt, ModelArg, grouped
from lilliput.errors import PlanError, ToldError
from lilliput.machine import ranks
from lilliput.options import Text
from lilliput.report import table

app = typer.Typer(
    name="lilliput",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

measure.register(app)
metrics.register(app)
masking.register(app)
converting.register(app)
merging.register(app)
serving.register(app)
# Bars of the libraries below would fill a log, so they are for terminals. Read as the libraries are imported, and by
# child processes.
_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


@app.callback()
def together(context: typer.Context) -> None:
    """Compress a Hugging Face causal language model within a budget, and report what was lost."""
    if ranks.size() > 1 and context.invoked_subcommand not in {"compress", "plan"}:
        with guarded():
            error = f"{ranks.size()} processes were started, but {context.invoked_subcommand} runs in a single one"
            raise (PlanError if ranks.lead() else ToldError)(f"{error}: start it without torchrun")


@app.command()
@grouped
def compress(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    job: Job,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure on; by default docs:library.")] = None,
    eval_windows: Annotated[
        int, typer.Option(min=0, help="Windows of 1,024 tokens to measure on; 0: none.")
    ] = Text.windows,
    to: ToOpt = None,
    html: HtmlOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compress MODEL into a folder that engines load, and report what was lost."""

    def run() -> Any:
        from lilliput.report import page

        if html is not None:
            page.writable(html)
            if not eval_windows:
                raise PlanError("a page shows what was measured: leave out --html, or give --eval-windows")
        from lilliput import api
        from lilliput.progress import Progress

        options = job.arguments()
        with Progress() as progress:
            result = api.compress(
                model, out, **options, eval_data=eval_data, eval_windows=eval_windows, to=to, progress=progress
            )
        if html is not None and ranks.lead():
            page.write(html, page.render(result.evidence or {}))
        return result.to_json()

    answer(run, table.compress, as_json, resume=True)


@app.command()
@grouped
def plan(
    model: ModelArg,
    job: Job,
    to: ToOpt = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Measure how small it can get: predicted loss against bytes.")
    ] = False,
    html: HtmlOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """What compress would do: bytes by kind of tensor, bits per weight, peak RAM, time. Reads no weights, except for
    --frontier."""

    def run() -> Any:
        from lilliput import api

        if frontier:
            return _frontier(model, job, to, html)
        if html is not None:
            raise PlanError("a plan has no page: add --frontier, or leave out --html")
        return api.plan(model, **job.arguments(), to=to).to_json()

    def view(data: Any) -> Any:
        if not frontier:
            return table.plan(data)
        from lilliput.report import frontier as curve

        return curve.show(data)

    answer(run, view, as_json)


def _frontier(model: str, job: Job, to: str | None, html: Path | None) -> Any:
    from lilliput import api
    from lilliput.progress import Progress
    from lilliput.report import frontier as curve
    from lilliput.report import page

    options = job.arguments()
    for name in ("recipe", "size", "bits", "decode_time"):
        if options.pop(name) is not None:
            raise PlanError(
                f"--frontier covers all sizes, and --{name.replace('_', '-')} names one: leave one of them out"
            )
    if options.pop("teacher") is not None:
        raise PlanError("--frontier trains no model that --teacher could teach: leave one of them out")
    if options.pop("fit_blocks"):
        raise PlanError("--frontier writes no model whose blocks --fit-blocks could fit: leave one of them out")
    if html is not None:
        page.writable(html)
    with Progress() as progress:
        data = api.frontier(model, **options, to=to, progress=progress).to_json()
    if html is not None:
        page.write(html, curve.render(data))
    return data


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder or GGUF file written by compress.")],
    memory: MemoryOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Check a written folder or GGUF file: hashes, shapes, finite values, and that its engine opens it and computes
    what it holds."""

    def run() -> Any:
        from lilliput import api
        from lilliput.units import parse_size

        return plain(api.verify(folder, memory=parse_size(memory, "--memory")))

    if answer(run, table.verify, as_json).get("problems"):
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method or a catalogue id.")] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print a recipe that runs NAME, as YAML.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """All methods; one method's page; or a recipe that runs a method or a catalogue id."""
    from lilliput.methods import index as catalogue
    from lilliput.recipe import page
    from lilliput.recipe.load import load, to_yaml

    with guarded():
        if recipe:
            if name is None:
                raise PlanError(
                    "--recipe needs the name of a method or a catalogue id: `lilliput methods gptq --recipe`"
                )
            named_recipe = load(name)
            write(
                dump(named_recipe.model_dump(mode="json", exclude_defaults=True)) if as_json else to_yaml(named_recipe)
            )
        elif as_json:
            write(dump(catalogue.index() if name is None else catalogue.entry(catalogue.find(name))))
        elif name is not None:
            write(page.page(catalogue.find(name)))
        else:
            Console().print(table.methods(catalogue.index()))


@app.command()
def inspect(
    model: ModelArg,
    data: Annotated[str | None, typer.Option(help="Text to measure per-site outliers on.")] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Size from which on an input is an outlier.")] = 6.0,
    as_json: JsonOpt = False,
) -> None:
    """Anatomy of MODEL: blocks, sites, links, groups, parameter counts; with --data outliers by site."""

    def run() -> Any:
        from lilliput import api

        return plain(api.inspect(model, data=data, alpha=alpha))

    answer(run, table.inspect, as_json)


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
) -> None:
    """Let MODEL continue a prompt, to see for yourself that it still works."""

    def run() -> Any:
        from lilliput import api

        return api.generate(model, prompt, max_new_tokens=max_new_tokens)

    with guarded():
        with redirected():
            text = run()
        write(f"{text}\n")


def main() -> None:
    """Entry point of the `lilliput` command."""
    if not sys.stderr.isatty():
        for name in _BARS:
            os.environ.setdefault(name, "1")
    app()
