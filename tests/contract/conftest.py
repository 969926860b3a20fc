"""One toy block with correlated inputs, for every method: norm -> q, k, v (grouped) -> o, norm -> up -> down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Linear, Link, Site
from lilliput.stats import fold
from lilliput.verbs.view import BlockIO, BlockView

WIDTH, KEYS, INNER, TOKENS = 48, 16, 96, 1500


@dataclass(frozen=True)
class Toy:
    """Norm gains and weights by name, calibration inputs of each site, and the anatomy that describes them."""

    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    block: Block

    def view(self) -> BlockView:
        gains = {name: self.tensors[name] for name in ("norm", "norm2")}
        return BlockView(self.block, {x.name: self.tensors[x.name] for x in self.block.linears}, gains)

    def forward(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return forward(tensors, x)

    def io(self) -> BlockIO:
        folded = {n: fold.update(fold.init(x.shape[1], fold.NAMES), x) for n, x in self.inputs.items()}
        return BlockIO({n: fold.finish(s) for n, s in folded.items()}, movement=self.moved)

    def moved(self, weights: Mapping[str, Tensor]) -> float:
        x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(6))
        before = forward(self.tensors, x)
        change = forward({**self.tensors, **weights}, x) - before
        return float((change.square().sum(1) / before.square().sum(1)).mean())


def forward(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """Grouped attention without the softmax (its weights are the keys' job, not a fold's), then a gateless MLP."""
    x = x / x.square().mean(1, keepdim=True).sqrt()
    a = x * t["norm"]
    gate = torch.sigmoid((a @ t["q"].T).mean(1, keepdim=True) + (a @ t["k"].T).mean(1, keepdim=True))
    v = (a @ t["v"].T).view(-1, KEYS // 8, 1, 8).expand(-1, -1, 3, -1).reshape(-1, WIDTH)
    h = (v * gate) @ t["o"].T
    return h + torch.nn.functional.relu((x * t["norm2"]) @ t["up"].T) @ t["down"].T


@pytest.fixture
def toy() -> Toy:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def inputs(width: int) -> Tensor:
        return randn(TOKENS, width) @ randn(width, width) * torch.exp(randn(width)) / width**0.5

    sizes = {"q": (WIDTH, WIDTH), "k": (KEYS, WIDTH), "v": (KEYS, WIDTH), "o": (WIDTH, WIDTH)}
    sizes |= {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    # Columns of uneven size, as real weights have them.
    tensors = {n: randn(*s) * torch.exp(0.5 * randn(s[1])) * 0.1 for n, s in sizes.items()}
    tensors |= {"norm": torch.rand(WIDTH, generator=g) + 0.5, "norm2": torch.rand(WIDTH, generator=g) + 0.5}
    site = {"q": "q", "k": "q", "v": "q", "o": "o", "up": "up", "down": "down"}
    linears = tuple(Linear(n, n, site[n], *sizes[n]) for n in sizes)  # type: ignore[arg-type]
    sites = tuple(
        Site(s, sizes[s][1], tuple(n for n in site if site[n] == s), i) for i, s in enumerate(["q", "o", "up", "down"])
    )
    shared = torch.arange(KEYS).view(-1, 1, 8).expand(-1, 3, -1).reshape(-1)
    links = (
        Link("norm", "norm", ("q", "k", "v"), "q", torch.arange(WIDTH)),
        Link("linear", "v", ("o",), "o", shared),
        Link("norm", "norm2", ("up",), "up", torch.arange(WIDTH)),
        Link("linear", "up", ("down",), "down", torch.arange(INNER)),
    )
    return Toy(tensors, {s.name: inputs(s.width) for s in sites}, Block(linears, sites, links, ()))
