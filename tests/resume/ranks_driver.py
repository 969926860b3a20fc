"""Starts jobs of several processes that know each other, as torchrun does, for tests. Imports happen once, then forks.

Reads one JSON job a line from standard input, answers each with one JSON line: for each rank `code` and `stderr`, and
`stdout` of them all. A job: `ranks`, and `code` (Python that is run in each rank), or what kill_driver.py knows, where
`at` strikes the rank `on`; `imports` are modules that all jobs find imported from then on. Unlike torchrun nobody ends
the others when one ends: they have to notice.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import kill_driver

from lilliput.cli import main as cli
from lilliput.model.stored import StoredModel

LIMIT = 60  # seconds after which a rank that hangs is ended
plain = StoredModel.anatomy


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def child(job: dict[str, Any], rank: int, where: int, folder: Path) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    size = str(job["ranks"])
    os.environ.update(RANK=str(rank), WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(where))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LIMIT)
    end = 0
    try:
        if "at" in job and rank == job["on"]:
            kill_driver.patch(job)
        if "code" in job:
            exec(job["code"], {"rank": rank})
        else:
            sys.argv = ["lilliput", *job["line"]]
            cli.main()
    except SystemExit as ended:
        end = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        end = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        StoredModel.anatomy = plain  # type: ignore[method-assign]
        if "model" in job:  # every rank finds the anatomy ready, and does not time the machine for the plan
            kill_driver.warm(job["model"])
            importlib.import_module("lilliput.report.table")
        for module in job.get("imports", ()):  # once, and not in each rank
            importlib.import_module(module)
        where = port()
        with tempfile.TemporaryDirectory() as name:
            pids = []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    child(job, rank, where, Path(name))
                pids.append(pid)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            found = {
                kind: [Path(name, f"{kind}-{n}").read_text(encoding="utf-8") for n in range(len(pids))]
                for kind in ("out", "err")
            }
        print(json.dumps({"code": codes, "stdout": found["out"], "stderr": found["err"]}), flush=True)


if __name__ == "__main__":
    main()
