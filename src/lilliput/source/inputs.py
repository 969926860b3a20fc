"""How a folder's config says that the inputs of its linears are rounded while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lilliput.errors import SourceError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.linear import parse_config
from lilliput.runtime.inputs import Rounding, described
from lilliput.source.compressed import scheme_for
from lilliput.source.reader import Reader

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs


def find(method: str | None, config: Mapping[str, Any], reader: Reader, label: str) -> dict[str, Rounding]:
    """By linear, under its name in the files, what happens to its inputs. Raises SourceError for a grid that cannot be
    computed here."""
    if method == "lilliput":
        found = {x.stored: described(x, reader.read) for x in parse_config(config).values()}
        return {name: x for name, x in found.items() if x is not None}
    return _compressed(config, reader, label) if method == "compressed-tensors" else {}


def _compressed(raw: Mapping[str, Any], reader: Reader, label: str) -> dict[str, Rounding]:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate({k: v for k, v in raw.items() if k not in ("dequantize", "version")})
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
    unit, kind = str(getattr(args.strategy, "value", args.strategy)), str(getattr(args.type, "value", args.type))
    if kind != "int" or unit not in ("token", "tensor", "group"):
        raise SourceError(
            f"{label}: the inputs of {base} are rounded to {args.num_bits}-bit {kind} by {unit}, which is not computed "
            "here. Run the folder in vLLM, or take integers by token, tensor or group."
        )
    dynamic, size = bool(args.dynamic), int(args.group_size or 0) if unit == "group" else 0
    spec = UniformInput(int(args.num_bits), unit, size, bool(args.symmetric), dynamic)  # type: ignore[arg-type]
    if dynamic:
        return InputGrid(spec)
    scale = f"{base}.input_scale"
    if scale not in reader.entries:
        raise SourceError(f"{label}: {scale} is missing, and the inputs of {base} are rounded with static scales.")
    tensors = {SCALE: reader.read(scale).float().reshape(-1)}
    if not args.symmetric:
        tensors[ZERO] = reader.read(f"{base}.input_zero_point").to(torch.int32).reshape(-1)
    return InputGrid(spec, tensors)
