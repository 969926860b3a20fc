"""The commands about measuring itself: `lilliput metrics` lists, `lilliput spread` repeats a compression by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lilliput.cli import command
from lilliput.cli.options import Job, JsonOpt, ModelArg, grouped
from lilliput.errors import PlanError
from lilliput.options import HELD_OUT, Calibration, Compute, Limits, Text


def metrics(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A metric, benchmark or catalogue id.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """All metrics and benchmarks with the command that runs each; or the page of one."""
    from lilliput.report import table
    from lilliput.studies import index

    with command.guarded():
        entries = index.index() if name is None else [index.entry(x) for x in index.find(name)]
        if as_json:
            command.write(command.dump(entries))
        elif name is not None:
            command.write("\n".join(index.page(x) for x in index.find(name)))
        else:
            Console().print(table.metrics(entries))


@grouped
def spread(
    model: ModelArg,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study; the same command continues from what it contains.")],
    seeds: Annotated[str, typer.Option(help="Calibration seeds, comma-separated: three or more.")] = "0,1,2",
    job: Job,
    eval_data: Annotated[str, typer.Option(help="Text to measure on.")] = HELD_OUT,
    eval_windows: Annotated[int, typer.Option(min=2, help="Windows of 1,024 tokens to measure on.")] = Text.windows,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed folders.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Compress MODEL once for each calibration seed, and report how much the results differ."""

    def run() -> Any:
        from lilliput.progress import Progress
        from lilliput.studies import spread as study

        numbers = [x.strip() for x in seeds.split(",")]
        if not all(x.isdigit() for x in numbers):
            raise PlanError(f"--seeds '{seeds}': give whole numbers, such as 0,1,2")
        if job.seed is not None:
            raise PlanError("each run draws its samples with its own seed: give --seeds, not --seed")
        if job.bits is not None or job.menu is not None:
            raise PlanError("a spread measures one recipe: give --recipe instead of --bits and --menu")
        from lilliput import api

        options = job.arguments()
        with Progress() as progress:
            return study.spread(
                model,
                out,
                seeds=[int(x) for x in numbers],
                recipe=job.recipe or api.DEFAULT_RECIPE,
                settings=options["settings"],
                calibration=Calibration(job.data, job.samples, job.tokens),
                limits=Limits(options["memory"], options["size"]),
                compute=Compute(job.dtype, job.device, job.work),
                text=Text((eval_data,), eval_windows),
                keep=keep,
                progress=progress,
            ).to_json()

    from lilliput.report import table

    command.answer(run, table.spread, as_json, resume=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="metrics")(metrics)
    app.command(name="spread")(spread)
