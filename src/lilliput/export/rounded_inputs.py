"""What compressed-tensors can say of rounded inputs, and the tensors of linears that have them.

8-bit weights beside rounded inputs are written as `int-quantized`, the layout that engines have integer kernels for:
`weight` int8 [out, in], `weight_scale` [out, groups] and, asymmetric, `weight_zero_point` int8 of that shape; those of
fewer bits stay packed. Static scales are `input_scale` [1] and, asymmetric, `input_zero_point` int8 [1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.export.outcome import Outcome
from lilliput.formats.format import Stored
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.quantized import QuantizedPart

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

PACKED, WHOLE = "pack-quantized", "int-quantized"


def layout(outcome: Outcome) -> str:
    """The layout of a quantized linear."""
    form = outcome.codes
    whole = outcome.scheme.activation is not None and form is not None and form.bits == 8
    return WHOLE if whole else PACKED


def refuse(outcome: Outcome, decoded: bool) -> str | None:
    """Why a linear's inputs cannot be described, or None; `decoded`: by a folder that is decoded while it loads."""
    grid = outcome.scheme.activation
    if grid is None:
        return None
    if decoded:
        return (
            f"the inputs of '{outcome.name}' become {grid.describe()}, and transformers decodes this folder while it "
            "loads, which drops that. Nearest: symmetric weights; export 'lilliput' holds it."
        )
    held = isinstance(grid, UniformInput) and grid.clip == 1.0
    if not isinstance(grid, UniformInput) or not held or (not grid.dynamic and grid.granularity != "tensor"):
        return (
            f"the inputs of '{outcome.name}' become {grid.describe()}{'' if held else ' of a kind or range'}, which "
            "compressed-tensors cannot say. Nearest: act-static-dynamic with dynamic scales by token, or one static "
            "scale; export 'lilliput' holds it."
        )
    if outcome.codes is None:
        return (
            f"'{outcome.name}' has rounded inputs and weights that are {outcome.scheme.weights.describe()}: engines "
            "round the inputs of integers alone. Nearest: rtn or gptq with format int; export 'lilliput' holds it."
        )
    return None


def described(outcome: Outcome) -> Stored:
    """The tensors of an `int-quantized` linear's weight, or none, and those of its inputs; suffix after the name."""
    form, grid = outcome.codes, outcome.scheme.activation
    tensors: Stored = {}
    if form is not None and layout(outcome) == WHOLE:
        rows, width = outcome.out_features, outcome.in_features
        groups = 1 if form.group_size <= 0 else width // form.group_size
        tensors |= {".weight": (torch.int8, (rows, width)), ".weight_scale": (form.scale_dtype, (rows, groups))}
        if not form.symmetric:
            tensors[".weight_zero_point"] = (torch.int8, (rows, groups))
    if isinstance(grid, UniformInput) and not grid.dynamic:
        tensors[".input_scale"] = (torch.float32, (1,))
        if not grid.symmetric:
            tensors[".input_zero_point"] = (torch.int8, (1,))
    return tensors


def packed(outcome: Outcome, part: QuantizedPart, grid: InputGrid | None) -> dict[str, Tensor]:
    """The tensors that `described` names."""
    form = outcome.codes
    tensors: dict[str, Tensor] = {}
    if form is not None and layout(outcome) == WHOLE:
        rows = len(part.codes)
        scale = part.grid.scale.expand(rows, -1) if form.group_size == 0 else part.grid.scale
        tensors = {".weight": part.codes.to(torch.int8), ".weight_scale": scale.to(form.scale_dtype)}
        if part.grid.zero is not None:
            zero = part.grid.zero.expand(rows, -1) if form.group_size == 0 else part.grid.zero
            tensors[".weight_zero_point"] = zero.to(torch.int8)
    if grid is not None and SCALE in grid.tensors:
        tensors[".input_scale"] = grid.tensors[SCALE].float()
        if ZERO in grid.tensors:
            tensors[".input_zero_point"] = grid.tensors[ZERO].to(torch.int8)
    return {name: x.contiguous() for name, x in tensors.items()}


def args(grid: UniformInput) -> QuantizationArgs:
    """The library's description of a grid for inputs."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy=grid.granularity,
        group_size=grid.group_size or None,
        dynamic=grid.dynamic,
    )
