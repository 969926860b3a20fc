#!/usr/bin/env python3
"""8-bit weights and inputs on this CPU: products of integers beside bfloat16 ones, of single layers and a whole model.

    python benchmarks/int8.py [--model MODEL] [--tokens 512] [--out FILE.json]
    LILLIPUT_VLLM_PYTHON=DIR/bin/python python benchmarks/int8.py --vllm --model MODEL [--folder W8A8] [--out FILE.json]

Layers: a linear of a compressed folder in the native layout, its inputs rounded by token in the time that is taken,
beside torch's bfloat16 linear of the same shape. MODEL: the same for a prefill of the whole model, compressed with the
recipe w8a8 (`export: lilliput`), without calibration text of one's own. Processor time of one thread, the two in turn,
medians.

--vllm: prefill alone, by vLLM's build for CPUs, of a W8A8 folder in compressed-tensors' layout (FOLDER, or made with
the recipe w8a8) beside the model itself in bfloat16. Each prompt of `--tokens` tokens is another one, and one token is
generated; both engines are in one process and take turns, without compiled graphs; tokens a second by the clock and by
processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lilliput  # noqa: F401 - registers the layout with transformers
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.linear import LinearSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.runtime.linear import CompressedLinear, compress_

SHAPES = {"1B, q": (2048, 2048), "1B, up": (8192, 2048), "1B, down": (2048, 8192), "135M, up": (1536, 576)}
ROUNDS = 9
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # both engines in this process, so that they can take turns
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


def compressed(rows: int, width: int) -> nn.Module:
    """A linear of 8-bit weights and inputs, with random values."""
    form = IntegerFormat(bits=8, symmetric=True, group_size=-1, scale_dtype=torch.float32)
    weight = torch.randn(rows, width)
    part = QuantizedPart(form, form.encode(weight, grid := form.fit(weight)), grid)
    spec = LinearSpec("x", "x", rows, width, Scheme((QuantizedSpec(form),), activation=UniformInput(8)))
    module: nn.Module = nn.Linear(width, rows, bias=False, dtype=torch.bfloat16)
    compress_(module, spec)
    if not isinstance(module, CompressedLinear):
        raise TypeError("the linear was not compressed")
    module.fill({f"x.weight{k}": v for k, v in part.pack().items()}, torch.device("cpu"))
    return module


def in_turn(*runs: Callable[[], Any]) -> list[float]:
    """Median seconds of each, one after the other `ROUNDS` times, after a round that does not count."""
    taken: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for n in range(ROUNDS + 1):
            for times, run in zip(taken, runs, strict=True):
                began = time.process_time()
                run()
                if n:
                    times.append(time.process_time() - began)
    return [statistics.median(x) for x in taken]


def layer(rows: int, width: int, tokens: int) -> dict[str, float]:
    """Milliseconds of both, and how many times as fast the integers are."""
    x = torch.randn(tokens, width).bfloat16()
    plain, ours = nn.Linear(width, rows, bias=False, dtype=torch.bfloat16), compressed(rows, width)
    slow, quick = in_turn(lambda: plain(x), lambda: ours(x))
    return {"bfloat16_ms": 1e3 * slow, "int8_ms": 1e3 * quick, "times": slow / quick}


def model(name: str, tokens: int) -> dict[str, float]:
    """The same for a prefill."""
    from transformers import AutoModelForCausalLM

    ids: Tensor = torch.arange(5, 5 + tokens).view(1, -1)
    with tempfile.TemporaryDirectory() as folder:
        out = w8a8(name, Path(folder), "lilliput")
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        slow, quick = in_turn(lambda: plain(ids, use_cache=False), lambda: ours(ids, use_cache=False))
    return {"bfloat16_ms": 1e3 * slow, "int8_ms": 1e3 * quick, "times": slow / quick}


def w8a8(name: str, place: Path, layout: str) -> Path:
    """The folder of the recipe, in a layout."""
    from lilliput import api
    from lilliput.progress import Quiet
    from lilliput.recipe.load import load

    recipe = load("w8a8").model_copy(update={"export": layout})
    out = place / "w8a8"
    api.compress(name, out, recipe=recipe, samples=4, tokens=256, eval_windows=0, progress=Quiet())
    return out


def vllm(python: str, name: str, folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """What vLLM's process says of the model in bfloat16 and of the folder."""
    line = [python, __file__, "--worker", "--model", name, "--folder", str(folder), "--tokens", str(tokens)]
    settings = {**os.environ, **ENGINE, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=settings, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    by_clock, by_cpu = (found[f"int8{x}"] / found[f"bfloat16{x}"] for x in ("", "_by_processor_time"))
    shape = {"tokens": tokens, "threads": threads}
    return {**found, **shape, "times": by_clock, "times_by_processor_time": by_cpu}


def work(name: str, folder: str, tokens: int) -> None:
    """What `vllm` starts, in an environment with vLLM: one line of JSON."""
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    out = os.dup(1)
    os.dup2(2, 1)  # the engine prints
    room = {"max_model_len": tokens + 16, "max_num_batched_tokens": tokens + 16, "max_num_seqs": 1}
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engines = [
        LLM(x, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True, **room)
        for x in (name, folder)
    ]
    rows: list[list[tuple[float, float]]] = [[] for _ in engines]
    for n in range(ROUNDS + 1):  # the first does not count
        prompt = {"prompt_token_ids": [5 + (n + at) % 200 for at in range(tokens)]}
        for engine, taken in zip(engines, rows, strict=True):
            clock, cpu = time.perf_counter(), time.process_time()
            engine.generate(prompt, one, use_tqdm=False)
            if n:
                taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    found: dict[str, Any] = {"vllm": version}
    for label, taken in zip(("bfloat16", "int8"), rows, strict=True):
        clock, cpu = (statistics.median(x) for x in zip(*taken, strict=True))
        found |= {label: tokens / clock, f"{label}_by_processor_time": tokens / cpu}
    os.write(out, (json.dumps(found) + "\n").encode())


def prefilled(options: argparse.Namespace) -> dict[str, Any]:
    """The row of `--vllm`."""
    python = os.environ.get("LILLIPUT_VLLM_PYTHON")
    if python is None or options.model is None:
        sys.exit("--vllm needs --model, and LILLIPUT_VLLM_PYTHON: make it with scripts/engine_env.py vllm DIR")
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or w8a8(options.model, Path(place), "compressed-tensors")
        row = vllm(python, options.model, folder, options.tokens, options.threads)
    print(
        f"vLLM {row['vllm']}, prompts of {row['tokens']} tokens: {row['bfloat16']:.0f} tokens/s in bfloat16, "
        f"{row['int8']:.0f} tokens/s in 8 bits, {row['times']:.2f}x, by processor time "
        f"{row['times_by_processor_time']:.2f}x"
    )
    return row


def said(row: dict[str, float]) -> str:
    """A row as it is printed."""
    return f"{row['bfloat16_ms']:8.3f} ms  {row['int8_ms']:8.3f} ms  {row['times']:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id")
    parser.add_argument("--tokens", type=int, default=512, help="of a prefill")
    parser.add_argument("--vllm", action="store_true", help="measure prefill in vLLM, and nothing else")
    parser.add_argument("--folder", type=Path, help="of --vllm: a W8A8 folder of the model; made where none is given")
    parser.add_argument("--threads", type=int, default=1, help="of --vllm")
    parser.add_argument(
        "--out", type=Path, help="where to write the figures as JSON; with --vllm added to what is there"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model, str(options.folder), options.tokens)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.vllm:
        before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
        write(options.out, {**before, "vllm prefill": prefilled(options)})
        return
    found: dict[str, Any] = {"threads": 1, "torch": torch.__version__}
    for count in (1, options.tokens):
        for name, (rows, width) in SHAPES.items():
            found[f"{name}, {count} tokens"] = row = layer(rows, width, count)
            print(f"{name:10} {count:5} tokens  {said(row)}")
    if options.model:
        found["prefill"] = row = model(options.model, options.tokens)
        print(f"prefill of {options.tokens} tokens  {said(row)}")
    write(options.out, found)


def write(out: Path | None, found: dict[str, Any]) -> None:
    """The figures, where a file is named."""
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
