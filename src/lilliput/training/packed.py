"""A base that stays packed while something beside it is trained: gradients pass through its linears to their inputs.

A linear of the folder becomes what it is when transformers opens the folder: it holds its packed tensors and is decoded
while it runs. On the way back it is decoded once more, so that no decoded weight is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput.anatomy.skeleton import Skeleton
from lilliput.parts import scheme as schemes
from lilliput.parts.linear import LinearSpec
from lilliput.runtime import inputs
from lilliput.runtime.linear import CompressedLinear, compress_
from lilliput.source import layers
from lilliput.source.source import Source


class _Past(torch.autograd.Function):
    """What a linear makes of x [.., in]; the gradient by x is that of the product with its weight, straight through
    whatever rounds x before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], linear: nn.Module) -> Tensor:
        ctx.linear = linear
        return run(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.linear.weight.to(slopes[0].dtype)
        return slopes[0] @ (weight.T if isinstance(ctx.linear, Conv1D) else weight), None, None


def hold(skeleton: Skeleton, source: Source, stored: str, name: str, shape: tuple[int, int], transposed: bool) -> None:
    """Put the linear `name`, [out, in], which the folder holds as codes under `stored`, into the model as it is.

    Its bias has to be in place. Raises SourceError for a packing of another engine that is not codes of integers.
    """
    spec, tensors = _described(source, stored, name, shape, transposed)
    linear = skeleton.model.get_submodule(name)
    rounding = inputs.of(linear)
    inputs.detach(linear)
    compress_(linear, spec)
    if not isinstance(linear, CompressedLinear):
        raise RuntimeError(f"{name} was not compressed")
    linear.fill(tensors, torch.device(skeleton.device))
    linear.to(skeleton.device)
    rounding = inputs.of(linear) or rounding
    inputs.detach(linear)
    inner = linear.forward

    def run(x: Tensor) -> Tensor:
        result: Tensor = inner(x if rounding is None else rounding.of(x))
        return result

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.requires_grad:
            return run(x)
        out: Tensor = _Past.apply(x, run, linear)  # type: ignore[no-untyped-call]
        return out

    linear.__dict__["forward"] = forward


def _described(
    source: Source, stored: str, name: str, shape: tuple[int, int], transposed: bool
) -> tuple[LinearSpec, Mapping[str, Tensor]]:
    """How the runtime describes a linear, and its packed tensors."""
    spec = source.linear(f"{stored}.weight")
    if spec is not None:
        return spec, {key: source.part(key) for key in spec.describe()}
    layer = layers.layer(source, stored, name, *shape, transposed=transposed)
    spec = LinearSpec(name, stored, *shape, schemes.of(layer), transposed)
    return spec, {spec.payload + suffix: x for suffix, x in spec.scheme.pack(layer).items()}


def is_packed(source: Source, stored: str) -> bool:
    """Whether the folder holds a linear as codes or in another form than a plain tensor."""
    key = f"{stored}.weight"
    return source.linear(key) is not None or source.packing(key) is not None
