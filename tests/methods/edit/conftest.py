"""A small block with its weights in float64, and inputs of its sites, for scores of edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.stats import fold
from lilliput.verbs.edits import EditView


@dataclass(frozen=True)
class Scored:
    """A gated MLP of 40 channels and two key-value heads of two query heads each; x: [50, width] by site."""

    block: Block
    weights: dict[str, Tensor]
    x: dict[str, Tensor]

    @property
    def view(self) -> EditView:
        return EditView(self.block, lambda name: self.weights[name].float())

    def stats(self, *names: str) -> dict[str, Any]:
        return {n: fold.finish(fold.update(fold.init(v.shape[1], names), v.float())) for n, v in self.x.items()}

    def gram(self, site: str) -> Tensor:
        return self.x[site].T @ self.x[site]


@pytest.fixture
def scored(toy: Any) -> Scored:
    block: Block = toy.model.anatomy().blocks[0]
    draw = torch.Generator().manual_seed(3)
    weights = {x.name: toy.model.read(f"model.layers.0.{x.name}.weight").double() for x in block.linears}
    x = {}
    for site in block.sites:
        mixed = torch.randn(50, site.width, generator=draw) @ torch.randn(site.width, site.width, generator=draw)
        x[site.name] = (mixed * torch.exp(torch.randn(site.width, generator=draw)) / site.width**0.5 + 0.3).double()
    return Scored(block, weights, x)
