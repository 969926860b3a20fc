"""Products with few tokens by a bit mask and its values, against the dense weight and torch's compressed rows.

    python benchmarks/sparse.py [--tokens 1] [--dtypes float32 bfloat16] [--json OUT]

For each shape and share of zeros, the least time of a call, all taken in turns in one process: `dense`, a plain weight
held in memory; `masked`, what a linear of kind "bitmask" does; `visited`, the same where there is no AVX-512;
`decoded`, the dense weight made anew for each call; `rows`, torch's compressed sparse rows. Ratios are over `dense`:
below 1 is quicker. The last columns are bytes per weight of the matrix.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from lilliput.algebra import products
from lilliput.parts import bitmask

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9)
TURNS = 4


def least(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Least seconds of each call over TURNS turns; what other processes take does not reach the least."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(TURNS):
        for name, call in calls.items():
            call()  # compiles, and fills the cache
            end = time.perf_counter() + seconds / TURNS / len(calls)
            while (began := time.perf_counter()) < end:
                call()
                found[name] = min(found[name], time.perf_counter() - began)
    return found


def measure(rows: int, width: int, zeros: float, dtype: torch.dtype, tokens: int, seconds: float) -> dict[str, Any]:
    """One matrix."""
    g = torch.Generator().manual_seed(rows + width)
    mask = torch.rand(rows, width, generator=g) >= zeros
    part = bitmask.gather(torch.randn(rows, width, generator=g), mask, dtype)
    stored = part.pack()
    values, bits, begin = stored[""], stored["_mask"], products.starts(stored["_mask"])
    dense = part.decode().to(dtype)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    compressed, across = dense.to_sparse_csr(), x.T.contiguous()

    product = products.Product(values, bits, begin)
    with mock.patch.object(products, "wide", return_value=False):
        visited = products.Product(values, bits, begin)

    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: torch.nn.functional.linear(x, dense),
        "masked": lambda: product(x.float()).to(dtype),
        "visited": lambda: visited(x.float()).to(dtype),
        "decoded": lambda: torch.nn.functional.linear(x, products.spread(values, bits, begin, width)),
    }
    if dtype is torch.float32:
        calls["rows"] = lambda: compressed @ across
    found = least(calls, seconds)
    csr = sum(t.nbytes for t in (compressed.values(), compressed.col_indices(), compressed.crow_indices()))
    return {
        "rows": rows,
        "width": width,
        "zeros": zeros,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "microseconds": {name: 1e6 * x for name, x in found.items()},
        "ratio": {name: x / found["dense"] for name, x in found.items() if name != "dense"},
        "bytes_per_weight": {
            "dense": float(dtype.itemsize),
            "masked": (values.nbytes + bits.nbytes + begin.nbytes) / mask.numel(),
            "rows": csr / mask.numel(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each matrix")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    print(f"AVX-512: {products.wide()}, one thread, {options.tokens} tokens")
    results = []
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for rows, width in SHAPES:
            for zeros in ZEROS:
                found = measure(rows, width, zeros, dtype, options.tokens, options.seconds)
                results.append(found)
                ratios = "  ".join(f"{name} {x:6.2f}" for name, x in found["ratio"].items())
                sizes = "  ".join(f"{name} {x:5.2f}" for name, x in found["bytes_per_weight"].items())
                shape = f"{found['dtype']:8} {rows:4} x {width:4}  {zeros:.0%} zeros"
                print(f"{shape}  dense {found['microseconds']['dense']:7.1f} us  {ratios}   bytes {sizes}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
