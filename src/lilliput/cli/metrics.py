"""The command that lists what can be measured: `lilliput metrics`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from lilliput.cli import command


def metrics(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A metric, benchmark or catalogue id.")] = None,
    as_json: command.JsonOpt = False,
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


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="metrics")(metrics)
