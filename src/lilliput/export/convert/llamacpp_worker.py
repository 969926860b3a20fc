"""What the Python that has llama_cpp runs: the tokens of texts and the logits of rows of tokens, out of one GGUF file.

Started as a file of its own by `export.convert.llamacpp`: that Python needs llama_cpp and numpy, and nothing of
Lilliput. A fault of the engine, which aborts, then ends a process that nobody else needs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tokens by text, without and with those that a prompt begins and ends with; logits go to `folder`/logits.npy,
    float32 [rows, tokens, vocabulary]."""
    import llama_cpp
    import numpy as np

    rows = request["rows"]
    length = max((len(row) for row in rows), default=8)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    engine = llama_cpp.Llama(
        request["model"],
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        logits_all=True,
        type_k=0,  # float32, as for V: what is compared is the weights
        type_v=0,
        verbose=True,  # to stderr, where the reason stands when it refuses a file
    )
    texts = [text.encode() for text in request["texts"]]
    out = {
        "version": llama_cpp.__version__,
        "tokens": [engine.tokenize(text, add_bos=False, special=True) for text in texts],
        "prompts": [engine.tokenize(text, add_bos=True, special=True) for text in texts],
    }
    if rows:
        shape = (len(rows), length, engine.n_vocab())
        logits = np.lib.format.open_memmap(folder / "logits.npy", mode="w+", dtype=np.float32, shape=shape)
        for i, row in enumerate(rows):
            engine.reset()
            engine.eval(row)
            logits[i, : len(row)] = engine.scores[: len(row)]
        logits.flush()
    return out


def main(folder: Path) -> None:
    """Answer what `folder`/request.json asks in `folder`/answer.json."""
    request = json.loads((folder / "request.json").read_text())
    try:
        reply = answer(request, folder)
    except Exception as error:  # whatever the engine raises is the answer
        reply = {"error": f"{type(error).__name__}: {error}"}
    (folder / "answer.json").write_text(json.dumps(reply))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
