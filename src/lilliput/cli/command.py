"""What all commands share: answers as a table or as JSON, errors as one message and an exit status."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console, RenderableType

from lilliput.errors import LilliputError, ToldError
from lilliput.machine import memory, ranks
from lilliput.units import finite


def answer(run: Callable[[], Any], view: Callable[[Any], RenderableType], as_json: bool, resume: bool = False) -> Any:
    """Run, then print the plain data that came back: as `view` shows it, or as one JSON object. Returns it.

    Of several processes the leader alone prints.
    """
    with guarded(resume):
        with redirected():
            memory.own_process()
            data = run()
        if not ranks.lead():
            return data
        if as_json:
            write(dump(data))
        else:
            Console().print(view(data))
    return data


def plain(answer: Any) -> Any:
    return answer.to_json() if hasattr(answer, "to_json") else answer


def dump(data: Any) -> str:
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def redirected() -> Iterator[None]:
    """What libraries print, from C as well, goes to standard error: standard output is for the answer alone."""
    sys.stdout.flush()
    standard_output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)


@contextmanager
def guarded(resume: bool = False) -> Iterator[None]:
    """Turn errors that the user can mend into one message and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except ToldError:
        raise typer.Exit(2) from None
    except LilliputError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        more = " Run the same command again: it continues after the last finished block." if resume else ""
        if ranks.lead():
            say(f"interrupted.{more}")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = ". Make room" + (" and run the same command again: finished blocks are kept" if resume else "")
        say(f"error: {error.strerror or error}{place}{remedy}")
        raise typer.Exit(2) from None


def say(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)
