"""How an engine holds a matrix in memory and multiplies with it: what that costs per weight and pass.

A file's layout does not decide the speed, the engine does: the same 4-bit file is read packed by a fused kernel,
decoded once at load, or decoded anew in each pass. `servings` says which, for the matrices of a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lilliput.algebra import products as by_mask
from lilliput.errors import PlanError
from lilliput.model.stored import Model
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.linear import LinearSpec, parse_config
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import PartSpec
from lilliput.runtime import int8, lut
from lilliput.runtime.linear import factored, kept_apart, tabled
from lilliput.source.compressed import parsed, scheme_for

Runtime = Literal["transformers", "kernels"]
RUNTIMES: tuple[Runtime, ...] = ("transformers", "kernels")
ARITHMETIC = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FP8 = ("fp8", "fbgemm_fp8", "finegrained_fp8")


@dataclass(frozen=True)
class Serving:
    """bits: read for each weight, scales and zero points included; arithmetic: whose peak counts ("fp32", "bf16",
    "fp16", "fp8", "int8"); inputs: bytes of one element of what is multiplied; keep: share of the multiplications
    that are carried out (n of m); decoded: bytes for each weight that are written and read again in each pass,
    because the engine decodes it first; packed: bits for each weight in the file, where the engine decodes it once at
    load; forming: float32 operations for each weight that decoding takes in each pass (products of factors,
    rotations); between: elements for each token that one of two thin products leaves to the other; tabled: tokens up
    to which tables of partial sums, or kept weights under a bit mask, serve without decoding, and their operations as a
    share of the dense product's.
    All are taken over the whole matrix's weights, however few are stored."""

    label: str
    bits: float
    arithmetic: str
    inputs: float
    keep: float = 1.0
    decoded: float = 0.0
    packed: float | None = None
    forming: float = 0.0
    between: int = 0
    tabled: tuple[int, float] | None = None

    def at(self, tokens: float) -> Serving:
        """How a pass over so many tokens runs it."""
        if self.tabled is None or tokens > self.tabled[0]:
            return self
        return replace(self, keep=self.tabled[1], decoded=0.0, forming=0.0, arithmetic="fp32")


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
        raise PlanError(f"{n}:{m} is not a sparsity pattern: keep at least 1 weight of m and fewer than m")
    plain = dense(dtype)
    stored = n * (plain.bits + math.ceil(math.log2(m))) / m
    return replace(plain, label=f"{n}:{m} sparse weights", bits=stored, keep=n / m)


def native(spec: LinearSpec, bits: float, dtype: torch.dtype, *, thin: bool, few: bool, apart: bool) -> Serving:
    """A linear of Lilliput's own layout, `bits` stored for each weight, as `lilliput.runtime.linear` runs it.

    thin: its factors are decoded and two thin products run; few: tables serve few tokens; apart: kept weights do.
    Otherwise the dense weight is decoded: a single part without transforms is written once, a sum is taken part by part
    in float32, turned back, and rounded.
    """
    rows, width = spec.out_features, spec.in_features
    plain, product = replace(dense(dtype), label=f"{int(bits)}-bit weights", bits=bits), spec.scheme.product
    if thin and product is not None:
        share = product.rank * (rows + width) / (rows * width)
        traffic = 2.0 * dtype.itemsize * share
        return replace(plain, label="low-rank factors", keep=share, decoded=traffic, between=product.rank)
    scheme = spec.scheme
    form = lut.form_of(scheme, width) if few else None
    tables = None if form is None else (lut.most(form), lut.operations(form, rows, width) / (2 * rows * width))
    if apart:
        share = sum(_kept(part, rows, width) for part in scheme.parts)
        tables = by_mask.most(), share
    turns = len(scheme.inputs) + len(scheme.outputs)
    through = 2.0 * dtype.itemsize
    if turns or len(scheme.parts) > 1:
        products = sum(1 for part in scheme.parts if part.operations(rows, width))
        # Zeros are written; a part or turn reads the sum and writes it, a product is written and read besides.
        through += 4.0 * (1 + 2 * (len(scheme.parts) + turns + products) + 1)
    return replace(plain, decoded=through, forming=scheme.operations(rows, width) / (rows * width), tabled=tables)


def _kept(part: PartSpec, rows: int, width: int) -> float:
    """Multiplications with a part as a share of the dense product's: kept weights under a bit mask, two factors."""
    if isinstance(part, BitmaskSpec):
        return part.count / (rows * width)
    return part.rank * (rows + width) / (rows * width) if isinstance(part, LowRankSpec) else 1.0


def servings(model: Model, tensors: Iterable[str], dtype: torch.dtype, runtime: Runtime) -> dict[str, Serving]:
    """How each of these matrices of a folder is served, plain tensors in `dtype`. Reads headers and config.json only.

    "transformers": compressed-tensors and other packed folders are decoded at load (or in the first pass) and run
    dense; Lilliput's own layout stays packed, runs products of factors as two thin products and is decoded in each pass
    otherwise. "kernels": an engine with a fused kernel for
    the layout, such as vLLM; there is none for Lilliput's own layout. Zeros stored as values are run as values.
    Raises PlanError for an unknown runtime or dtype.
    """
    if runtime not in RUNTIMES:
        raise PlanError(f"unknown runtime '{runtime}': one of {', '.join(RUNTIMES)}")
    plain = dense(dtype)
    arithmetic = _input_arithmetic(model)
    own = parse_config(_config(model)) if model.source.quantization == "lilliput" else {}
    out: dict[str, Serving] = {}
    for tensor in tensors:
        name = model.refs[tensor].stored
        stored = model.source.stored[name]
        elements = prod(stored.shape)
        bits = 8 * stored.nbytes / elements
        packed = replace(plain, label=f"{int(bits)}-bit weights", bits=bits)
        spec = own.get(name.removesuffix(".weight"))
        if spec is not None:
            kind = type(model.skeleton.model.get_submodule(tensor.removesuffix(".weight")))
            here = runtime == "transformers"
            if here and kind in (nn.Linear, Conv1D) and int8.forms(spec.scheme) is not None and int8.native():
                out[tensor] = replace(w8a8(), bits=bits)
                continue
            out[tensor] = native(
                spec,
                bits,
                dtype,
                thin=factored(kind, spec),
                few=here and tabled(kind, spec),
                apart=here and by_mask.available() and kept_apart(kind, spec),
            )
        elif stored.nbytes >= elements * stored.dtype.itemsize:
            out[tensor] = plain
        elif runtime == "transformers":
            out[tensor] = replace(plain, packed=bits)
        else:
            inputs = arithmetic(name.removesuffix(".weight"))
            out[tensor] = packed if inputs is None else replace(w8a8(inputs), bits=bits)
    return out


def _config(model: Model) -> Mapping[str, Any]:
    """What config.json says of how the weights are stored."""
    raw: dict[str, Any] = json.loads((model.source.folder / "config.json").read_text(encoding="utf-8"))
    places = (raw, raw.get("text_config") or {}, raw.get("llm_config") or {})
    config_entry: Mapping[str, Any] = next(
        x[k] for x in places for k in ("quantization_config", "compression_config") if x.get(k)
    )
    return config_entry


def _input_arithmetic(model: Model) -> Callable[[str], str | None]:
    """For a stored linear: the arithmetic where its inputs are quantized to 8 bits, None where they are not."""
    method = model.source.quantization
    if method in _FP8:
        return lambda _: "fp8"
    if method != "compressed-tensors":
        return lambda _: None
    config = parsed(_config(model))

    def find(linear: str) -> str | None:
        scheme = scheme_for(linear, config)
        entry = None if scheme is None else scheme.input_activations
        if entry is None or entry.num_bits != 8:
            return None
        return "int8" if entry.type == "int" else "fp8"

    return find
