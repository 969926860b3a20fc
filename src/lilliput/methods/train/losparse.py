"""LoSparse: a product of low rank and a sparse rest, trained together; columns of the rest leave by what they matter.

    What = U V + M * S.

The steps before fix the rank and how much of S is stored: one that prunes, then one that makes up for it by a product
(`eora`, `lorc`). Training begins at S = W - U V, all of it, and smoothed sensitivity times its uncertainty (`platon`)
decides which parts of S become 0, as the share of zeros rises: single weights, or blocks of `block` [r, c] by their
mean, such as columns of r rows.

Paper: Li et al. 2023, arXiv 2306.11222. Cost: S, its gradient, two moments and two more tensors, and thin factors.
Limits: a column leaves in stretches of r rows; whole columns need r to be the height of the linear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.methods.train.platon import Options as PlatonOptions
from lilliput.methods.train.platon import Uncertain
from lilliput.parts import kept
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankSpec, plain_factors
from lilliput.parts.pattern import PatternSpec
from lilliput.parts.scheme import Scheme
from lilliput.training.sparse import restarts
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(PlatonOptions):
    """See the module's docstring."""

    block: tuple[int, int] = Field((1, 1), description="rows and inputs of the blocks of S that stay or leave together")


class Rounded(torch.autograd.Function):
    """A factor as it is stored; gradients pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


class LowRankAndSparse(Uncertain):
    """U [out, r] and V [r, in] beside the sparse rest, which is `value`."""

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        rest, product = layer.parts
        spec = product.spec
        if not isinstance(spec, LowRankSpec) or not isinstance(spec.left, DenseSpec):
            raise RuntimeError(f"{layer.name} was not admitted as it is")
        rows, width = layer.weight.shape
        left, right = spec.factors(product.pack().__getitem__, rows, width, torch.empty(0))
        first = Layer(layer.name, rest.decode(), parts=(rest,))
        super().__init__(first, original - left @ right, o)
        self.block = o.block
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self._dtype = spec.left.dtype

    def weight(self) -> Tensor:
        return self.value + self._factor(self.left) @ self._factor(self.right)

    def _factor(self, value: Tensor) -> Tensor:
        factor: Tensor = Rounded.apply(value, self._dtype)  # type: ignore[no-untyped-call]
        return factor

    def finish(self) -> Layer:
        self.settled()
        if self._spec is None:
            raise RuntimeError(f"{self.name} has no part for the rest")
        sparse = Layer(self.name, self.value.detach().clone(), support=self.mask.clone())
        product = plain_factors(self.left.detach(), self.right.detach(), self._dtype)
        return replace(sparse, parts=(kept.part_of(sparse, self._spec), product), support=None)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The factors as they are stored, and what they leave over of the original."""
    return LowRankAndSparse(layer, original, o)


def admits(scheme: Scheme, o: Any) -> str | None:
    """Kept weights, and a product of plain factors."""
    first = scheme.parts[0] if scheme.parts else None
    plain = not scheme.inputs and not scheme.outputs and scheme.activation is None and len(scheme.parts) == 2
    held = isinstance(first, BitmaskSpec) or (isinstance(first, PatternSpec) and isinstance(first.values, DenseSpec))
    last = scheme.parts[-1] if scheme.parts else None
    if plain and held and isinstance(last, LowRankSpec) and isinstance(last.left, DenseSpec):
        return None
    what = f"stored as {scheme.describe()}" if scheme.parts else "a plain linear"
    return (
        f"it is {what}, and a sparse matrix beside a product of floats is trained: put `magnitude` and `eora` with "
        "factors float16 in front of it"
    )


METHOD = Train(
    paper="Li et al. 2023, arXiv 2306.11222",
    options=Options,
    covers={
        "losparse": [
            {"method": "magnitude", "target": {"sparsity": 0.75}, "options": {"block": [16, 1]}},
            {"method": "eora", "target": {"rank": 4}, "options": {"factors": "float16"}},
            {"method": "losparse", "options": {"block": [16, 1]}},
        ]
    },
    recipe=[
        {"method": "magnitude", "target": {"sparsity": 0.75}},
        {"method": "eora", "target": {"rank": 8}, "options": {"factors": "float16"}},
        {"method": "losparse"},
    ],
    begin=begin,
    admits=admits,
    copies=8,
    moves=True,
    restarts=restarts,
)
