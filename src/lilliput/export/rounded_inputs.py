"""What compressed-tensors can say of rounded inputs, and the tensors that tell of them.

Static scales are `input_scale` [1] and, asymmetric, `input_zero_point` int8 [1]; nvfp4 stores the factor of all its
scales, `input_global_scale` float32 [1]. Which inputs go with which weights is what engines have products for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.export.layouts import FLOAT, MXFP4, MXFP8, NVFP4, PACKED, WHOLE
from lilliput.export.outcome import Outcome
from lilliput.export.small_floats import kinds
from lilliput.formats.format import Stored
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.minifloat import GLOBAL, FloatInput
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

Held = UniformInput | FloatInput
INTEGERS = "act-static-dynamic with dynamic scales by token, or one static scale"
NEAREST = {
    PACKED: INTEGERS,
    WHOLE: INTEGERS,
    FLOAT: "minifloat with format fp8, by token or with one static scale",
    NVFP4: "minifloat with format nvfp4",
    MXFP4: "minifloat with format mxfp4 and power: even",
    MXFP8: "minifloat with format mxfp8 and power: even",
}
_BLOCKS = {
    NVFP4: FloatInput("e2m1", "group", 16, "e4m3"),
    MXFP4: FloatInput("e2m1", "group", 32, "e8m0-even"),
    MXFP8: FloatInput("e4m3", "group", 32, "e8m0-even"),
}


def refuse(outcome: Outcome, decoded: bool, because: Outcome | None = None) -> str | None:
    """Why a linear's inputs cannot be described, or None; `decoded`: by a folder that is decoded while it loads, or has
    to be `because` of a linear."""
    grid, layout = outcome.scheme.activation, outcome.layout
    if grid is None:
        return None
    if decoded or because is not None:
        why = "" if because is None else f" for the {because.scheme.weights.describe()} of '{because.name}'"
        nearest = "symmetric integers, or fp8"
        if because is not None and because.codes is not None and because.codes.symmetric:
            model = str(because.dtype).removeprefix("torch.")
            nearest = f"a model in bfloat16 (this one is {model}), or format fp8"
        return (
            f"the inputs of '{outcome.name}' become {grid.describe()}, and transformers decodes this folder while it "
            f"loads{why}, which drops that. Nearest: {nearest}; export 'lilliput' holds it."
        )
    if layout is None:
        return (
            f"'{outcome.name}' has rounded inputs and weights that are {outcome.scheme.weights.describe()}: engines "
            "round the inputs of integers and of fp8, mxfp4, mxfp8 and nvfp4 alone. Nearest: rtn or gptq with format "
            "int; export 'lilliput' holds it."
        )
    if not holds(layout, grid):
        clipped = " of a kind or range" if getattr(grid, "clip", 1.0) != 1.0 else ""
        return (
            f"the inputs of '{outcome.name}' become {grid.describe()}{clipped}, which compressed-tensors cannot say "
            f"beside weights that are {outcome.scheme.weights.describe()}. Nearest: {NEAREST[layout]}; export "
            "'lilliput' holds it."
        )
    return None


def holds(layout: str, grid: InputSpec) -> bool:
    """Whether weights in this layout may have such inputs."""
    if layout in _BLOCKS:
        return grid == _BLOCKS[layout]
    if isinstance(grid, UniformInput):
        held = layout in (PACKED, WHOLE) and grid.clip == 1.0
        return held and (grid.dynamic or grid.granularity == "tensor")
    if isinstance(grid, FloatInput) and layout == FLOAT:
        return grid.table == "e4m3" and grid.granularity in ("token", "tensor") and grid.clip == 1.0
    return False


def described(outcome: Outcome) -> Stored:
    """The tensors of a linear's inputs; suffix after the name."""
    grid = outcome.scheme.activation
    if isinstance(grid, FloatInput) and grid.scales == "e4m3":
        return {".input_global_scale": (torch.float32, (1,))}
    if not isinstance(grid, Held) or grid.dynamic:
        return {}
    scale: Stored = {".input_scale": (torch.float32, (1,))}
    asymmetric = isinstance(grid, UniformInput) and not grid.symmetric
    return scale | {".input_zero_point": (torch.int8, (1,))} if asymmetric else scale


def packed(grid: InputGrid | None) -> dict[str, Tensor]:
    """The tensors that `described` names."""
    tensors: dict[str, Tensor] = {}
    if grid is None:
        return tensors
    if SCALE in grid.tensors:
        tensors[".input_scale"] = grid.tensors[SCALE].float()
    if ZERO in grid.tensors:
        tensors[".input_zero_point"] = grid.tensors[ZERO].to(torch.int8)
    if GLOBAL in grid.tensors:
        tensors[".input_global_scale"] = grid.tensors[GLOBAL].float()
    return {name: x.contiguous() for name, x in tensors.items()}


def args(grid: InputSpec) -> QuantizationArgs:
    """The library's description of a grid for inputs that some layout `holds`."""
    from compressed_tensors.quantization import QuantizationArgs

    if isinstance(grid, UniformInput):
        more: dict[str, Any] = {"type": "int", "symmetric": grid.symmetric}
    elif isinstance(grid, FloatInput):
        more = {"type": "float", "symmetric": True} | ({} if grid.scales == "float32" else kinds(grid.scales))
    else:
        raise TypeError(f"compressed-tensors has no inputs that are {grid.describe()}")
    local = isinstance(grid, FloatInput) and grid.scales == "e4m3"
    return QuantizationArgs(
        num_bits=int(grid.bits),
        strategy="tensor_group" if local else grid.granularity,
        group_size=grid.group_size or None,
        dynamic="local" if local else grid.dynamic,
        **more,
    )
