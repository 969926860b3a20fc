"""How a folder's config says that the inputs of its linears are rounded while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.minifloat import GLOBAL, FloatInput
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.linear import parse_config
from lilliput.runtime.inputs import Rounding, described
from lilliput.source.compressed import parsed, scheme_for
from lilliput.source.reader import Reader

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_TABLES = {8: "e4m3", 6: "e2m3", 4: "e2m1"}  # the library's small floats, by their bits


def find(method: str | None, config: Mapping[str, Any], reader: Reader, label: str) -> dict[str, Rounding]:
    """By linear, under its name in the files, what happens to its inputs. Raises SourceError for a grid that cannot be
    computed here."""
    if method == "lilliput":
        found = {x.stored: described(x, reader.read) for x in parse_config(config).values()}
        return {name: x for name, x in found.items() if x is not None}
    return _compressed(config, reader, label) if method == "compressed-tensors" else {}


def _compressed(raw: Mapping[str, Any], reader: Reader, label: str) -> dict[str, Rounding]:
    config = parsed(raw)
    if all(x.input_activations is None for x in config.config_groups.values()):
        return {}
    found: dict[str, Rounding] = {}
    for name in reader.entries:
        base, _, leaf = name.rpartition(".")
        if leaf not in ("weight_packed", "weight") or f"{base}.weight_scale" not in reader.entries:
            continue
        scheme = scheme_for(base, config)
        if scheme is not None and scheme.input_activations is not None:
            found[base] = Rounding(_grid(base, scheme.input_activations, reader, label))
    return found


def _grid(base: str, args: QuantizationArgs, reader: Reader, label: str) -> InputGrid:
    """As a static scale is stored: `input_scale`, `input_zero_point`, and nvfp4's `input_global_scale`."""
    unit, kind = str(getattr(args.strategy, "value", args.strategy)), str(getattr(args.type, "value", args.type))
    spec = _integers(args, unit) if kind == "int" else _floats(args, unit)
    if spec is None:
        raise SourceError(
            f"{label}: the inputs of {base} are rounded to {args.num_bits}-bit {kind} by {unit}, which is not computed "
            "here. Run the folder in vLLM, or take integers by token, tensor or group, or fp8, mxfp4, mxfp8 or nvfp4."
        )

    def stored(suffix: str) -> Tensor:
        name = f"{base}.{suffix}"
        if name not in reader.entries:
            raise SourceError(f"{label}: {name} is missing, and the inputs of {base} are rounded with static scales.")
        return reader.read(name).reshape(-1)

    if isinstance(spec, FloatInput) and spec.scales == "e4m3":
        return InputGrid(spec, {GLOBAL: stored("input_global_scale").float()})
    if spec.dynamic:
        return InputGrid(spec)
    tensors = {SCALE: stored("input_scale").float()}
    if not args.symmetric:
        tensors[ZERO] = stored("input_zero_point").to(torch.int32)
    return InputGrid(spec, tensors)


def _integers(args: QuantizationArgs, unit: str) -> UniformInput | None:
    if unit not in ("token", "tensor", "group"):
        return None
    size = int(args.group_size or 0) if unit == "group" else 0
    return UniformInput(int(args.num_bits), unit, size, bool(args.symmetric), bool(args.dynamic))  # type: ignore[arg-type]


def _floats(args: QuantizationArgs, unit: str) -> FloatInput | None:
    """The library's rules: 32 inputs with scales of a byte have powers of two, whatever else is said."""
    table, size = _TABLES.get(int(args.num_bits)), int(args.group_size or 0)
    dynamic = getattr(args.dynamic, "value", args.dynamic)
    if table is None or not args.symmetric or unit not in ("token", "tensor", "group", "tensor_group"):
        return None
    if unit == "tensor_group":
        local = dynamic == "local" and args.scale_dtype == torch.float8_e4m3fn
        return FloatInput(table, "group", size, "e4m3") if local else None
    if unit != "group":
        return FloatInput(table, unit, dynamic=bool(dynamic)) if args.scale_dtype is None else None  # type: ignore[arg-type]
    if not dynamic:
        return None
    if args.scale_dtype is None:
        return FloatInput(table, "group", size)
    powers = size == 32 and args.scale_dtype == torch.uint8
    return FloatInput(table, "group", size, "e8m0-even") if powers else None
