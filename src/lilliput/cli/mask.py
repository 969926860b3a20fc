"""The command that records a static mask of a folder whose MLPs have gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.cli import command
from lilliput.cli.options import JsonOpt


def mask(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that dynamic-pruning has written.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the mask is called: it is DIR/masks/NAME.json.")],
    data: Annotated[str, typer.Option(help="Text of the task: a .txt or .jsonl file, or what eval --data takes.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the groups of hidden channels; by default that of DIR.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a window; by default 1,024.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Record the groups of hidden channels that a text uses most, for `lilliput.use_mask`. No weight changes."""

    def run() -> Any:
        from lilliput import api

        return {"mask": str(api.record_mask(folder, name, data, windows=windows, tokens=tokens, keep=keep))}

    def view(found: Any) -> str:
        return f"{found['mask']}: run with it by lilliput.use_mask(lilliput.load({str(folder)!r}), {name!r})"

    command.answer(run, view, as_json)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="mask")(mask)
