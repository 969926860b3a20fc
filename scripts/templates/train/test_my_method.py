"""What my-method trains, against its equations."""

from __future__ import annotations

import torch

from lilliput.methods.train.my_method import Options, begin
from lilliput.parts.layer import Layer


def test_my_method_starts_at_the_layer_and_ends_as_the_equations_say() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, slope = torch.randn(6, 8, generator=draw), torch.randn(6, 8, generator=draw)
    core = begin(Layer("a", weight), weight, Options())
    assert torch.equal(core.weight(), weight)
    core.weight().backward(slope)
    # replace: your equations, as obvious as can be
    (factor,) = core.parameters()
    assert factor.grad is not None
    expected = (slope.double() * weight.double()).sum(1, keepdim=True)
    torch.testing.assert_close(factor.grad.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        factor.mul_(2.0)
    torch.testing.assert_close(core.finish().decode(), 2 * weight)
