#!/usr/bin/env python3
"""8-bit weights and inputs on this CPU: products of integers beside bfloat16 ones, of single layers and a whole model.

    python benchmarks/int8.py [--model MODEL] [--tokens 512] [--out FILE.json]

Layers: a linear of a compressed folder in the native layout, its inputs rounded by token in the time that is taken,
beside torch's bfloat16 linear of the same shape. MODEL: the same for a prefill of the whole model, compressed with the
recipe w8a8 (`export: lilliput`), without calibration text of one's own. Processor time of one thread, the two in turn,
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
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

    from lilliput import api
    from lilliput.progress import Quiet
    from lilliput.recipe.load import load, to_yaml

    steps = to_yaml(load("w8a8")).replace("export: compressed-tensors", "export: lilliput")
    ids: Tensor = torch.arange(5, 5 + tokens).view(1, -1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "w8a8"
        api.compress(name, out, recipe=steps, samples=4, tokens=256, eval_windows=0, progress=Quiet())
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        slow, quick = in_turn(lambda: plain(ids, use_cache=False), lambda: ours(ids, use_cache=False))
    return {"bfloat16_ms": 1e3 * slow, "int8_ms": 1e3 * quick, "times": slow / quick}


def said(row: dict[str, float]) -> str:
    """A row as it is printed."""
    return f"{row['bfloat16_ms']:8.3f} ms  {row['int8_ms']:8.3f} ms  {row['times']:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id")
    parser.add_argument("--tokens", type=int, default=512, help="of a prefill")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"threads": 1, "torch": torch.__version__}
    for count in (1, options.tokens):
        for name, (rows, width) in SHAPES.items():
            found[f"{name}, {count} tokens"] = row = layer(rows, width, count)
            print(f"{name:10} {count:5} tokens  {said(row)}")
    if options.model:
        found["prefill"] = row = model(options.model, options.tokens)
        print(f"prefill of {options.tokens} tokens  {said(row)}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
