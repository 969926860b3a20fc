"""The command that merges an adapter into the folder that it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.cli import command
from lilliput.cli.options import JsonOpt


def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that the adapter was trained for.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of the adapter; by default DIR/adapter.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank to which one by dylora is cut.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Merge an adapter into DIR, where that changes no codes; elsewhere say what quantizing anew would lose."""

    def run() -> Any:
        from lilliput import api

        return api.merge(folder, out, adapter=adapter, rank=rank).to_json()

    def view(found: Any) -> str:
        what = f"{found['linears']} products and {found['biases']} biases"
        return f"{found['out']}: {what} of {found['adapter']} are part of its tensors now"

    command.answer(run, view, as_json)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge")(merge)
