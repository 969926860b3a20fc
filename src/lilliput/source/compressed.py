"""Weights of a compressed-tensors folder: which scheme holds for each, and where its parts lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from pydantic import ValidationError
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.source.packed import Packed, Scaled, block_of
from lilliput.source.reader import Reader
from lilliput.source.turned import undo

PLAIN = {"pack-quantized", "int-quantized", "naive-quantized", "float-quantized"}
PAIRS = {"nvfp4-pack-quantized", "mxfp4-pack-quantized"}
LIBRARY = PAIRS | {"mxfp8-quantized"}


@dataclass(frozen=True)
class ByLibrary:
    """Small floats in blocks, decoded by compressed-tensors' own compressor of that format."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    scheme: QuantizationScheme
    named: tuple[tuple[str, str], ...]  # the compressor's name of a part -> stored name

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(stored for _, stored in self.named)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        state = {local: reader.read(stored) for local, stored in self.named}
        compressor = BaseCompressor.get_value_from_registry(self.format)
        weight: Tensor = compressor.decompress(state, self.scheme)["weight"]
        return (weight if rows is None else weight[rows[0] : rows[1]]).to(self.dtype).contiguous()


def parsed(raw: Mapping[str, Any]) -> QuantizationConfig:
    """The library's form of a quantization_config, without what only transformers reads of it."""
    return QuantizationConfig.model_validate({k: v for k, v in raw.items() if k not in ("dequantize", "version")})


def find(reader: Reader, raw: Mapping[str, Any], dtype: torch.dtype, label: str) -> dict[str, Packed]:
    """Logical name ("x.weight") -> how to decode it. Raises SourceError for what has no reader, by name."""
    try:
        config = parsed(raw)
    except (ValidationError, ValueError) as error:
        raise SourceError(
            f"{label}: compressed-tensors cannot read its quantization_config: {str(error).splitlines()[0]}."
        ) from error
    sparsity = raw.get("sparsity_config") or {}
    if sparsity.get("format", "dense") not in ("dense", None):
        raise SourceError(
            f"{label} is stored as '{sparsity['format']}', a legacy sparse layout. Decompress it with the "
            "llm-compressor version that wrote it, and give the dense folder here."
        )
    packed: dict[str, Packed] = {}
    for name in reader.entries:
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and f"{base}.weight_scale" in reader.entries):
            packed[f"{base}.weight"] = _one(reader, base, leaf, config, dtype, label)
    return undo(reader, raw, packed, label)


def _one(reader: Reader, base: str, leaf: str, config: QuantizationConfig, dtype: torch.dtype, label: str) -> Packed:
    scheme = scheme_for(base, config)
    if scheme is None or scheme.weights is None:
        raise SourceError(
            f"{label}: no group of its quantization_config names {base}, whose weight is stored as codes."
        )
    kind, entries, args = str(scheme.format or config.format), reader.entries, scheme.weights
    kind = kind.removeprefix("CompressionFormat.").replace("_", "-")
    if kind not in PLAIN | LIBRARY | {"mixed-precision", "None"}:
        raise SourceError(
            f"{label}: {base} is stored as '{kind}', which has no reader here. Decompress the folder with "
            "`AutoModelForCausalLM.from_pretrained(..., dtype='bfloat16')`, save it, and give that folder."
        )

    def part(suffix: str) -> str | None:
        return f"{base}.{suffix}" if f"{base}.{suffix}" in entries else None

    scale = part("weight_scale")
    if scale is None:
        raise SourceError(f"{label}: {base}.weight_scale is missing, so {base}.{leaf} has no values.")
    if kind in LIBRARY:
        names = (leaf, "weight_scale", "weight_global_scale")
        rows, width = entries[f"{base}.{leaf}"].shape
        whole = (rows, 2 * width if kind in PAIRS else width)
        return ByLibrary(whole, dtype, kind, scheme, tuple((x, y) for x in names if (y := part(x))))
    bits = None
    shape = entries[f"{base}.{leaf}"].shape
    if leaf == "weight_packed":
        bits = int(args.num_bits)
        stated = part("weight_shape")
        if stated is None:
            raise SourceError(f"{label}: {base}.weight_shape is missing, so the width of {base}.{leaf} is unknown.")
        words = shape
        shape = tuple(int(x) for x in reader.read(stated).reshape(-1))
        if len(shape) != 2 or words != (shape[0], -(-shape[1] * bits // 32)):
            raise SourceError(
                f"{label}: {base}.weight_packed {list(words)} does not hold {list(shape)} codes of {bits} bits packed "
                "densely. compressed-tensors before 0.19 packed 3, 5, 6 and 7 bits otherwise: write the folder anew."
            )
    order = part("weight_g_idx")
    size = args.group_size
    block_size = tuple(args.block_structure) if args.block_structure else (1, int(size)) if size and size > 0 else None
    grid = entries[scale].shape
    block = block_of(shape, grid, block_size) if order is None else (1, 1)
    if block is None:
        raise SourceError(f"{label}: {scale} {list(grid)} does not fit {base}.weight {list(shape)} and its groups.")
    zero = part("weight_zero_point")
    packed = zero is not None and bits is not None and entries[zero].dtype == torch.int32
    return Scaled(shape, dtype, f"{base}.{leaf}", scale, block, bits, zero, packed, order)


def scheme_for(name: str, config: QuantizationConfig) -> QuantizationScheme | None:
    """The group that names this module: exactly, else by pattern, else by class, as the library ranks them."""
    best: tuple[int, QuantizationScheme] | None = None
    for scheme in config.config_groups.values():
        for target in scheme.targets:
            rank = 0 if target == name else 1 if target.startswith("re:") else 2
            hit = re.match(target[3:], name) is not None if rank == 1 else rank == 0 or "." not in target
            if hit and (best is None or rank < best[0]):
                best = (rank, scheme)
    return None if best is None else best[1]
