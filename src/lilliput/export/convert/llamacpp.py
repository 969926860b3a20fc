"""llama.cpp through the Python package llama_cpp, asked in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lilliput.errors import LilliputError

VARIABLE = "LILLIPUT_LLAMACPP_PYTHON"
INSTALL = f"install llama-cpp-python beside lilliput, or set {VARIABLE} to a Python that has it"
_WORKER = Path(__file__).with_name("llamacpp_worker.py")


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a file: tokens of each text, alone and as a prompt (with the token that it begins with);
    logits float32 [rows, tokens, vocabulary], shorter rows filled up with 0. problem: why there is none of it."""

    version: str = ""
    tokens: Sequence[Sequence[int]] = ()
    prompts: Sequence[Sequence[int]] = ()
    logits: Tensor | None = None
    problem: str | None = None


def python() -> str | None:
    """The Python that has llama_cpp: the one that the environment names, or this one. None where neither is there.

    Raises LilliputError where the named one has no llama_cpp.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None
    try:
        done = subprocess.run(
            [named, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"],
            capture_output=True,
        )
    except OSError as error:
        raise LilliputError(f"{VARIABLE} is {named}, which does not start ({error.strerror}): name a Python") from None
    if done.returncode:
        raise LilliputError(f"{VARIABLE} is {named}, which has no llama_cpp: install llama-cpp-python there")
    return named


def ask(python: str, file: Path, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Answer:
    """Tokens of `texts` and logits of `rows` of tokens, each a context of its own, as llama.cpp has them of `file`.

    What the engine cannot do is the answer's problem and not raised.
    """
    with tempfile.TemporaryDirectory(prefix="lilliput-llamacpp-") as place:
        folder = Path(place)
        request = {"model": str(file.absolute()), "texts": list(texts), "rows": [list(row) for row in rows]}
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run([python, str(_WORKER), place], capture_output=True, text=True, errors="replace")
        out = folder / "answer.json"
        lines = [x for x in done.stderr.splitlines() if x.strip()]
        if not out.exists():
            reason = next((x for x in reversed(lines) if "ASSERT" in x), f"it ended with status {done.returncode}")
            return Answer(problem=f"llama.cpp stops: {reason}")
        reply = json.loads(out.read_text())
        if "error" in reply:
            reason = next((x for x in lines if "error" in x), reply["error"])
            return Answer(problem=f"llama.cpp does not open it: {reason}")
        logits = torch.from_numpy(np.load(folder / "logits.npy")) if rows else None
        return Answer(reply["version"], reply["tokens"], reply["prompts"], logits)
