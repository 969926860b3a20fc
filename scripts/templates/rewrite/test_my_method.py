"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import math

import torch

from lilliput.anatomy.model import Block, Linear, Link, Site
from lilliput.folds.kinds import ScaleFold
from lilliput.methods.rewrite.my_method import Options, rewrite
from lilliput.stats.fold import init, update
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView


def reference(inputs: torch.Tensor, strength: float) -> list[float]:
    """replace: your equations, as obvious as can be."""
    powers = [max(abs(float(x)) for x in inputs[:, j]) ** strength for j in range(inputs.shape[1])]
    mean = math.exp(sum(math.log(p) for p in powers) / len(powers))
    return [p / mean for p in powers]


def test_my_method_agrees_with_the_reference_and_keeps_the_function() -> None:
    width, strength = 8, 0.7
    draw = torch.Generator().manual_seed(0)
    gain = torch.rand(width, generator=draw) + 0.5
    x = torch.randn(20, width, generator=draw)
    weight = torch.randn(4, width, generator=draw)
    link = Link("norm", "norm", ("up",), "up", torch.arange(width))
    block = Block((Linear("up", "up", "up", 4, width),), (Site("up", width, ("up",), 0),), (link,), ())
    stats = update(init(width, ("absmax",)), x * gain)
    folds = rewrite(BlockView(block, {"up": weight}), BlockIO({"up": stats}), Target(), Options(strength=strength))
    assert len(folds) == 1
    fold = folds[0]
    assert isinstance(fold, ScaleFold)
    expected = torch.tensor(reference((x * gain).double(), strength))
    torch.testing.assert_close(fold.scale, expected, rtol=1e-5, atol=0)
    after = (x * (gain / fold.scale)) @ (weight * fold.scale).T
    torch.testing.assert_close(after, (x * gain) @ weight.T, rtol=1e-4, atol=1e-5)
