"""What perplexity and KL of a compressed model cost, against the bare forward passes of the two models.

    python benchmarks/evaluation.py BASE FOLDER --text TEST.txt --windows 40 --out evaluation.json

BASE is a folder or a GGUF file, which transformers then decodes once, before the clock starts. A bare pass is
`transformers`' own: a window of tokens through the whole model to its logits, which are thrown away, with both models
loaded before the clock starts. The evaluation reads both models from disk, streams them, and makes all metrics (with
the token classes and worst tokens of the report). A machine's speed drifts by more than the difference that is looked
for, so the two take turns of two seconds, each stopped while the other runs, and bare passes go on until the
evaluation is done. Each one's seconds are those in which it ran.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

TURN = 2.0  # seconds


def evaluation(arguments: argparse.Namespace) -> None:
    """In a process of its own: announces that it is ready, waits, evaluates, ends."""
    from lilliput.metrics.evaluate import evaluate

    shape = {"windows": arguments.windows, "tokens": arguments.tokens, "dtype": arguments.dtype}
    print("ready", flush=True)
    sys.stdin.readline()
    evaluate(arguments.folder, arguments.base, data=arguments.text, detail=True, **shape)


def bare(arguments: argparse.Namespace) -> None:
    """In a process of its own: announces that it is ready, waits, and writes a line for each window that went through
    both models, until it is killed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lilliput.data import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    ids = load_tokens(arguments.text, tokenizer, samples=arguments.windows, tokens=arguments.tokens).ids
    dtype = getattr(torch, arguments.dtype)
    where = {"gguf_file": arguments.base.name} if arguments.base.is_file() else {}
    base = arguments.base.parent if where else arguments.base
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **where).eval()]
    models.append(AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=dtype).eval())
    with torch.no_grad():
        for model in models:
            model(ids[:1], use_cache=False)
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            for window in ids:
                for model in models:
                    model(window[None], use_cache=False)
                print("window", flush=True)


def one_round(arguments: list[str]) -> dict[str, float]:
    """Both in turns until the evaluation is done."""
    children, outputs = [], []
    for kind in ("evaluation", "bare"):
        command = [sys.executable, __file__, *arguments, "--child", kind]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        output = _pipe(child.stdout)
        if output.readline() != b"ready\n":
            raise RuntimeError(f"the process for '{kind}' ended early")
        os.killpg(child.pid, signal.SIGSTOP)
        _pipe(child.stdin).write(b"go\n")
        _pipe(child.stdin).flush()
        children.append(child)
        outputs.append(output)
    measured, other = children
    seconds = [0.0, 0.0]
    windows, counted = 0, 0.0
    with selectors.DefaultSelector() as lines:
        lines.register(outputs[1], selectors.EVENT_READ)
        os.set_blocking(outputs[1].fileno(), False)
        while measured.poll() is None:
            began = time.perf_counter()
            os.killpg(measured.pid, signal.SIGCONT)
            while time.perf_counter() - began < TURN and measured.poll() is None:
                time.sleep(0.01)
            if measured.returncode is None:
                os.killpg(measured.pid, signal.SIGSTOP)
            seconds[0] += time.perf_counter() - began
            began = time.perf_counter()
            os.killpg(other.pid, signal.SIGCONT)
            while (remaining := TURN - (time.perf_counter() - began)) > 0:
                if lines.select(remaining) and (lines_read := outputs[1].read()):
                    windows += lines_read.count(b"\n")
                    counted = seconds[1] + time.perf_counter() - began
            os.killpg(other.pid, signal.SIGSTOP)
            seconds[1] += time.perf_counter() - began
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    if measured.returncode:
        raise RuntimeError("the evaluation failed")
    return {"evaluation": seconds[0], "bare": counted, "bare_windows": windows}


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("a process has no pipe")
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("evaluation", "bare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"evaluation": evaluation, "bare": bare}[arguments.child](arguments)
        return
    rows = []
    for _ in range(arguments.rounds):
        row = one_round(sys.argv[1:])
        row["ratio"] = row["evaluation"] / (row["bare"] / row["bare_windows"] * arguments.windows)
        rows.append(row)
        print(" ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
    figures = {
        "folder": arguments.folder.name,
        "tokens": arguments.windows * arguments.tokens,
        "dtype": arguments.dtype,
        "ratio": sorted(x["ratio"] for x in rows)[len(rows) // 2],
        "rounds": rows,
    }
    print(f"{figures['tokens']} tokens: {figures['ratio']:.2f} times the two bare forward passes")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
