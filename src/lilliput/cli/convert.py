"""The command that writes a finished folder as the container of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.cli.command import answer
from lilliput.cli.options import JsonOpt
from lilliput.report import table

CONTAINERS = "adapter, awq, compressed-tensors, gguf, gptq or mlx"
ToOpt = Annotated[str | None, typer.Option("--to", help=f"Write this container: {CONTAINERS}.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(convert)


def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by compress, or a plain model.")],
    to: Annotated[str, typer.Option(help=f"The container: {CONTAINERS}.")],
    out: Annotated[Path, typer.Option(help="File or folder to write; it must not exist yet.")],
    like: Annotated[
        Path | None, typer.Option(help="GGUF file of the same model, whose metadata and tokenizer are copied.")
    ] = None,
    checkpoint_format: Annotated[
        str | None, typer.Option(help="Of gptq: gptq or gptq_v2, how zero points are held.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write DIR as another engine's container: codes are copied unchanged, nothing is quantized twice."""

    def run() -> Any:
        from lilliput import api

        return api.convert(folder, out, to=to, like=like, checkpoint_format=checkpoint_format).to_json()

    answer(run, table.convert, as_json)
