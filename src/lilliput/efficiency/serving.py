"""How an engine holds a matrix in memory and multiplies with it: what that costs per weight and pass.

A file's layout does not decide the speed, the engine does: the same 4-bit file is read packed by a fused kernel,
decoded once at load, or decoded anew in each pass. `servings` says which, for the matrices of a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from lilliput.errors import PlanError
from lilliput.model import Model
from lilliput.source.compressed import scheme_for

Runtime = Literal["transformers", "kernels"]
RUNTIMES: tuple[Runtime, ...] = ("transformers", "kernels")
ARITHMETIC = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FP8 = ("fp8", "fbgemm_fp8", "finegrained_fp8")


@dataclass(frozen=True)
class Serving:
    """bits: read for each weight, scales and zero points included; arithmetic: whose peak counts ("fp32", "bf16",
    "fp16", "fp8", "int8"); inputs: bytes of one element of what is multiplied; keep: share of the multiplications that
    are carried out (n of m); decoded: bytes for each weight that are written and read again in each pass, because the
    engine decodes it first; packed: bits for each weight in the file, where the engine decodes it once at load."""

    label: str
    bits: float
    arithmetic: str
    inputs: float
    keep: float = 1.0
    decoded: float = 0.0
    packed: float | None = None


def dense(dtype: torch.dtype) -> Serving:
    """Plain weights of a 32- or 16-bit float. Raises PlanError for another dtype."""
    if dtype not in ARITHMETIC:
        raise PlanError(f"{dtype} is not a dtype that models are served in: float32, bfloat16 or float16")
    return Serving("dense", 8.0 * dtype.itemsize, ARITHMETIC[dtype], float(dtype.itemsize))


def weight_only(bits: int, group_size: int, dtype: torch.dtype, *, scale_bits: int = 16, zero_bits: int = 0) -> Serving:
    """Integers of `bits` with a scale (and zero point) for each `group_size` inputs, multiplied in `dtype` by a fused
    kernel (as in Frantar et al. 2024, "MARLIN")."""
    if bits < 1 or group_size < 1:
        raise PlanError(f"{bits} bits in groups of {group_size}: both are at least 1")
    stored = bits + (scale_bits + zero_bits) / group_size
    return replace(dense(dtype), label=f"{bits}-bit weights", bits=stored)


def w8a8(arithmetic: str = "int8") -> Serving:
    """Weights and inputs in 8 bits ("int8" or "fp8"), multiplied as such (Dettmers et al. 2022; Xiao et al. 2023)."""
    return Serving("8-bit weights and inputs", 8.0, arithmetic, 1.0)


def sparse(n: int, m: int, dtype: torch.dtype) -> Serving:
    """n of m weights kept, with the index of each, skipped by the hardware (Mishra et al. 2021). Only engines that
    store a matrix so gain from it; zeros in a dense file are multiplied like any other weight."""
    if not 0 < n < m:
        raise PlanError(f"{n}:{m} is no sparsity: keep at least 1 weight of m and fewer than m")
    plain = dense(dtype)
    stored = n * (plain.bits + math.ceil(math.log2(m))) / m
    return replace(plain, label=f"{n}:{m} sparse weights", bits=stored, keep=n / m)


def decoded_each_pass(packed: Serving, dtype: torch.dtype) -> Serving:
    """The packed bytes are read, the dense matrix is written and read again: once in each pass."""
    plain = dense(dtype)
    return replace(plain, label=packed.label, bits=packed.bits, decoded=2.0 * dtype.itemsize)


def servings(model: Model, tensors: Iterable[str], dtype: torch.dtype, runtime: Runtime) -> dict[str, Serving]:
    """How each of these matrices of a folder is served, plain tensors in `dtype`. Reads headers and config.json only.

    "transformers": compressed-tensors and other packed folders are decoded at load (or in the first pass) and run
    dense; Lilliput's own layout stays packed and is decoded in each pass. "kernels": an engine with a fused kernel for
    the layout, such as vLLM; there is none for Lilliput's own layout. Zeros stored as values are run as values.
    Raises PlanError for an unknown runtime or dtype.
    """
    if runtime not in RUNTIMES:
        raise PlanError(f"unknown runtime '{runtime}': one of {', '.join(RUNTIMES)}")
    plain = dense(dtype)
    arithmetic = _input_arithmetic(model)
    out: dict[str, Serving] = {}
    for tensor in tensors:
        name = model.refs[tensor].stored
        stored = model.source.stored[name]
        elements = prod(stored.shape)
        bits = 8 * stored.nbytes / elements
        held = replace(plain, label=f"{int(bits)}-bit weights", bits=bits)
        if stored.nbytes >= elements * stored.dtype.itemsize:
            out[tensor] = plain
        elif model.source.quantization == "lilliput":
            out[tensor] = decoded_each_pass(held, dtype)
        elif runtime == "transformers":
            out[tensor] = replace(plain, packed=bits)
        else:
            inputs = arithmetic(name.removesuffix(".weight"))
            out[tensor] = held if inputs is None else replace(w8a8(inputs), bits=bits)
    return out


def _input_arithmetic(model: Model) -> Callable[[str], str | None]:
    """For a stored linear: the arithmetic where its inputs are quantized to 8 bits, None where they are not."""
    method = model.source.quantization
    if method in _FP8:
        return lambda _: "fp8"
    if method != "compressed-tensors":
        return lambda _: None
    from compressed_tensors.quantization import QuantizationConfig

    raw: dict[str, Any] = json.loads((model.source.folder / "config.json").read_text(encoding="utf-8"))
    places = (raw, raw.get("text_config") or {}, raw.get("llm_config") or {})
    how = next(x[k] for x in places for k in ("quantization_config", "compression_config") if x.get(k))
    config = QuantizationConfig.model_validate({k: v for k, v in how.items() if k not in ("dequantize", "version")})

    def find(linear: str) -> str | None:
        scheme = scheme_for(linear, config)
        entry = None if scheme is None else scheme.input_activations
        if entry is None or entry.num_bits != 8:
            return None
        return "int8" if entry.type == "int" else "fp8"

    return find
