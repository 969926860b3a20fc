"""The command that becomes the server of another program."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lilliput.cli.command import dump, guarded, say, write
from lilliput.cli.options import JsonOpt
from lilliput.engines import serve as engines


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings={"allow_extra_args": True})(serve)


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote, or a .gguf file.")],
    engine: Annotated[str, typer.Option(help="auto, vllm, llama.cpp or transformers.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = engines.Address.host,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = engines.Address.port,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, start nothing.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Start the engine that fits DIR as a server of the OpenAI protocol. What follows -- goes to the engine."""
    with guarded():
        server = engines.choose(
            model,
            engines.installed(),
            engine=engine,
            address=engines.Address(host, port),
            options=context.args,
        )
        if as_json:
            write(dump(server.to_json()))
        elif dry_run:
            write(shlex.join(server.command) + "\n")
        if dry_run:
            return
        say(f"{server.engine}: {shlex.join(server.command)}\n{server.note}")
        os.execv(server.command[0], server.command)
