"""Runs compressions for the tests beside it, each in a fork that may kill itself at a chosen call.

Reads one JSON job a line from standard input, answers each with one JSON line. Imports happen once, and so does the
look at the anatomy of the model that is named on the command line. A job: `args` of `lilliput.api.compress`, or `line`
for the command line, and optionally `at` ("module:attribute"), `call` (the how-manieth, from 1) and `how`:

- before, after: SIGKILL before or after the call;
- torn: SIGKILL with half of what the call is to write (`Work.note`, `_write_at` of an output file);
- interrupt: SIGINT before the call, as Ctrl-C sends it;
- hold: wait before the call until the file `until` exists, having created `reached`;
- fill: fill the disk of the folder `disk` before the call;
- refuse: instead of the call, what it raises on a disk that is full all the same.

`shard` is the size of an output file at most, in bytes.
A job with `background` is answered at once with its number; `wait` asks for its end.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from lilliput import api
from lilliput.cli import main as cli
from lilliput.model.stored import StoredModel, open_model
from lilliput.plan import tensors as inventory
from lilliput.progress import Quiet

torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn(args: tuple[Any, ...]) -> None:
    first, second = args[0], args[1]
    if hasattr(first, "note"):  # Work.note(record)
        line = json.dumps(second)
        with (first.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(line[: len(line) // 2])
    else:  # _write_at(handle, data, at)
        os.pwrite(first, second[: len(second) // 2], args[2])
    die()


def patch(job: dict[str, Any]) -> None:
    module, path = job["at"].split(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    plain: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != job["call"]:
            return plain(*args, **options)
        how = job["how"]
        if how == "before":
            die()
        if how == "torn":
            torn(args)
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if how == "hold":
            Path(job["reached"]).touch()
            while not Path(job["until"]).exists():
                time.sleep(0.01)
        if how == "fill":
            with contextlib.suppress(OSError), Path(job["disk"], "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
        if how == "refuse":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        answer = plain(*args, **options)
        if how == "after":
            die()
        return answer

    if isinstance(owner, type):
        setattr(owner, name, call)
    else:
        vars(owner)[name] = call  # a method's spec is frozen


def child(job: dict[str, Any], answer: int, errors: Path) -> None:
    stderr = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    os.dup2(stderr, 1)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        inventory.SHARD = job.get("shard", inventory.SHARD)
        if "at" in job:
            patch(job)
        if "line" in job:
            sys.argv = ["lilliput", *job["line"]]
            cli.main()
            return
        done = api.compress(**job["args"], progress=Quiet())
        os.write(answer, json.dumps({"skipped": done.skipped, "lockstep": done.plan.batching.lockstep}).encode())
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def warm(model: str) -> None:
    """Every fork finds the anatomy ready, and does not time the machine for the plan."""
    found = open_model(model).anatomy()
    setattr(StoredModel, "anatomy", lambda self: found)  # noqa: B010
    # `lilliput.plan.plan` is the function of that name; the module is found by import_module alone.
    setattr(importlib.import_module("lilliput.plan.cost"), "seconds", lambda *args, **options: 1.0)  # noqa: B010


def main() -> None:
    warm(sys.argv[2])
    errors = Path(sys.argv[1])
    running: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        if "wait" not in job:
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                child(job, write, errors / str(number))
                os._exit(0)
            os.close(write)
            running[str(number)] = pid, read
            if job.get("background"):
                print(json.dumps({"job": str(number)}), flush=True)
                continue
        key = job.get("wait", str(number))
        pid, read = running.pop(key)
        with os.fdopen(read, "rb") as file:
            result = file.read()
        _, status = os.waitpid(pid, 0)
        print(
            json.dumps(
                {
                    "code": os.waitstatus_to_exitcode(status),
                    "stderr": (errors / key).read_text(encoding="utf-8", errors="replace"),
                    **(json.loads(result) if result else {}),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
