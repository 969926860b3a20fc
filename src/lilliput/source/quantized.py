"""Checkpoints that are quantized already: found by `quant_method`, read as plain weights, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lilliput.errors import SourceError
from lilliput.source import compressed, native
from lilliput.source.packed import FP8, Packed, Scaled, block_of
from lilliput.source.reader import Reader

# What quantization leaves beside the weights; it means nothing once they are plain.
LEFT_OVER = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".q_scale", ".k_scale", ".v_scale", ".weight_shape", ".activation_scale", "_q_attn.weight",
    "_k_cache.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Mxfp4:
    """gpt-oss blocks uint8 [experts, out, groups, 16], scales uint8 [experts, out, groups]; read [experts, in, out]."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: str
    scales: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.blocks, self.scales)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        first, last = rows or (0, self.shape[0])
        out = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        for i in range(first, last):  # one expert at a time: the library's temporaries are several times its size
            blocks, scales = reader.read(self.blocks, (i, i + 1)), reader.read(self.scales, (i, i + 1))
            out[i - first] = convert_moe_packed_tensors(blocks, scales, dtype=self.dtype)[0]
        return out


@dataclass(frozen=True)
class Gptq:
    """GPTQ's int32 packing: qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out]."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    base: str
    bits: int
    group: int
    order: str | None
    plus: int  # the first format stores zero - 1

    @property
    def parts(self) -> tuple[str, ...]:
        named = tuple(f"{self.base}.{x}" for x in ("qweight", "qzeros", "scales"))
        return named if self.order is None else (*named, self.order)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        words, zeros, scales = (reader.read(x) for x in self.parts[:3])
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        mask = (1 << self.bits) - 1
        zeros = ((zeros[:, :, None] >> shifts) & mask).reshape(zeros.shape[0], -1)
        zeros = (zeros + self.plus) & mask if self.plus else zeros
        inputs = self.shape[1]
        groups = torch.arange(inputs) // self.group if self.order is None else reader.read(self.order).long()
        out = torch.empty(self.shape, dtype=self.dtype)
        per_word = 32 // self.bits
        for start in range(0, words.shape[0], 64):  # 64 rows of words at a time: temporaries stay small
            codes = ((words[start : start + 64, None, :] >> shifts[:, None]) & mask).reshape(-1, words.shape[1])
            group = groups[start * per_word : start * per_word + codes.shape[0]]
            values = (codes - zeros[group]).float() * scales[group].float()
            out[:, start * per_word : start * per_word + codes.shape[0]] = values.T.to(self.dtype)
        return out if rows is None else out[rows[0] : rows[1]].clone()


def find(reader: Reader, config: Mapping[str, Any], dtype: torch.dtype, label: str) -> dict[str, Packed]:
    """Logical weight name -> how to decode it. Raises SourceError for a method without a reader, naming the remedy."""
    method = str(config.get("quant_method", "compressed-tensors" if "config_groups" in config else "?")).lower()
    if method == "compressed-tensors":
        return compressed.find(reader, config, dtype, label)
    if method in ("fp8", "fbgemm_fp8", "finegrained_fp8"):
        return _fp8(reader, config, dtype, label)
    if method == "mxfp4":
        return _mxfp4(reader, dtype, label)
    if method == "gptq":
        return _gptq(reader, config, dtype, label)
    if method == "lilliput":
        return native.find(reader, config, dtype, label)
    raise SourceError(
        f"{label} is quantized with '{method}', which has no reader here (compressed-tensors, fp8, "
        "mxfp4, gptq and lilliput have one). Start from the unquantized model, which its model card names, or "
        "dequantize it with the library that wrote it and save it as safetensors."
    )


def _fp8(reader: Reader, config: Mapping[str, Any], dtype: torch.dtype, label: str) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    size = config.get("weight_block_size")
    for name, entry in reader.entries.items():
        if entry.dtype not in FP8:
            continue
        scale = next((x for x in (f"{name}_scale_inv", f"{name}_scale") if x in reader.entries), None)
        if scale is None or len(entry.shape) not in (2, 3):
            raise SourceError(
                f"{label}: {name} is stored in 8-bit floats and {name}_scale_inv or {name}_scale is missing."
            )
        grid = reader.entries[scale].shape
        whole = (int(size[0]), int(size[1])) if size and len(grid) >= 2 and grid[-1] != 1 else None
        block = block_of(entry.shape, grid, whole)
        if block is None:
            raise SourceError(
                f"{label}: {scale} {list(grid)} does not fit {name} {list(entry.shape)} in blocks of {size}."
            )
        packed[name] = Scaled(entry.shape, dtype, name, scale, block)
    return packed


def _mxfp4(reader: Reader, dtype: torch.dtype, label: str) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    for name, entry in reader.entries.items():
        if not name.endswith("_blocks"):
            continue
        base = name.removesuffix("_blocks")
        scales = reader.entries.get(f"{base}_scales")
        if scales is None or len(entry.shape) != 4 or scales.shape != entry.shape[:3]:
            raise SourceError(f"{label}: {name} {list(entry.shape)} has no {base}_scales that fits it.")
        experts, out, groups, half = entry.shape
        packed[base] = Mxfp4((experts, groups * half * 2, out), dtype, name, f"{base}_scales")
    return packed


def _gptq(reader: Reader, config: Mapping[str, Any], dtype: torch.dtype, label: str) -> dict[str, Packed]:
    if str(config.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        raise SourceError(
            f"{label}: GPTQ's layout '{config['checkpoint_format']}' has no reader here. Convert it to "
            "'gptq' with GPTQModel."
        )
    plus = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    packed: dict[str, Packed] = {}
    for name, entry in reader.entries.items():
        if not name.endswith(".qweight"):
            continue
        base = name.removesuffix(".qweight")
        bits, group = _gptq_grid(base, config, label)
        missing = [x for x in ("qzeros", "scales") if f"{base}.{x}" not in reader.entries]
        if missing:
            raise SourceError(f"{label}: {base}.{missing[0]} is missing, so {name} has no values.")
        width, rows = entry.shape[0] * 32 // bits, entry.shape[1]
        group = group if group > 0 else width
        order = f"{base}.g_idx" if f"{base}.g_idx" in reader.entries else None
        shapes = {x: reader.entries[f"{base}.{x}"].shape for x in ("qzeros", "scales")}
        grid = -(-width // group)
        expected: dict[str, tuple[int, ...]] = {"qzeros": (grid, rows * bits // 32), "scales": (grid, rows)}
        if order is not None:
            shapes, expected = shapes | {"g_idx": reader.entries[order].shape}, expected | {"g_idx": (width,)}
        if wrong := next((x for x in expected if shapes[x] != expected[x]), None):
            raise SourceError(
                f"{label}: {base}.{wrong} has shape {list(shapes[wrong])}, but {bits} bits in groups of {group}, as "
                f"its quantization_config says of this linear, need {list(expected[wrong])}. The config does not "
                "belong to these files: copy both from one place."
            )
        packed[f"{base}.weight"] = Gptq((rows, width), dtype, base, bits, group, order, plus)
    return packed


def _gptq_grid(base: str, config: Mapping[str, Any], label: str) -> tuple[int, int]:
    """Bits and group size of a linear: the first rule of `dynamic` whose pattern its name begins with, else those of
    all; a rule "-:..." leaves linears out, "+:..." or one without a sign gives them numbers of their own.

    Raises SourceError: a rule that leaves out a linear with codes, a pattern that is none, bits without a reader.
    """
    rules: Mapping[str, Any] = config.get("dynamic") or {}
    own: Mapping[str, Any] = {}
    for pattern, rule in rules.items():
        try:
            hit = re.match(pattern.removeprefix("-:").removeprefix("+:"), base) is not None
        except re.error as error:
            raise SourceError(f"{label}: '{pattern}' in its quantization_config's dynamic: {error}.") from error
        if hit and pattern.startswith("-:"):
            raise SourceError(
                f"{label}: '{pattern}' in its quantization_config's dynamic leaves {base} out, which is stored as "
                "codes. The config does not belong to these files: copy both from one place."
            )
        if hit:
            own = rule or {}
            break
    bits, group = (int(own.get(x, config.get(x, y))) for x, y in (("bits", 4), ("group_size", 128)))
    if bits not in (2, 4, 8):
        raise SourceError(
            f"{label}: GPTQ at {bits} bits ({base}) has no reader here (2, 4 and 8 have). Start from the "
            "original model."
        )
    return bits, group
