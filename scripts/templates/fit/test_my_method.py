"""my-method's step against its equations, written out in float64 on a block of one linear."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.methods.fit.my_method import Options, fit
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.view import FitBlock, FitIO

ROWS, WIDTH, LR = 6, 24, 0.05
TARGET = Target(bits=3, group_size=8, symmetric=True, scale_dtype="float32")


def step(codes: Tensor, scale: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
    """replace: your equations, as obvious as can be. Now: the factors after one step of Adam, which is `lr` long."""
    factor = torch.ones_like(scale, requires_grad=True)
    expected = (codes.view(ROWS, -1, 8) * (scale * factor)[:, :, None]).reshape(ROWS, WIDTH)
    (inputs @ (expected - weight).T).square().mean().backward()
    assert factor.grad is not None
    return 1.0 - LR * factor.grad.sign()


def test_my_method_takes_the_step_of_the_reference(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(ROWS, WIDTH, generator=draw), torch.randn(4, 5, WIDTH, generator=draw)
    stores = []
    for name, value in (("inputs", inputs), ("targets", inputs @ weight.T)):
        stores.append(Activations(tmp_path / name, (4, 5, value.shape[2]), torch.float32, create=True))
        stores[-1].write(0, value)
    anatomy = Block((Linear("a", "other", "a", ROWS, WIDTH),), (Site("a", WIDTH, ("a",), 0),), (), Groups())
    block = FitBlock(anatomy, {"a": Layer("a", weight)}, lambda weights, hidden: hidden @ weights["a"].T)
    parts = []
    for iters in (0, 1):
        shared = Options(iters=iters, lr=LR, batch=4, start="minmax", weigh="alike")
        (part,) = fit(block, FitIO({}, stores[0], stores[1], 2), {"a": TARGET}, shared).layers["a"].parts
        assert isinstance(part, QuantizedPart)
        parts.append(part)
    before, after = parts
    assert torch.equal(before.codes, after.codes)
    scale = before.grid.scale.double()
    expected = scale * step(before.codes.double(), scale, weight.double(), inputs.double())
    torch.testing.assert_close(after.grid.scale.double(), expected, rtol=1e-4, atol=0)
