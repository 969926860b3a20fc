"""What my-method trains, against its equations."""

from __future__ import annotations

import torch
from torch import nn

from lilliput.methods.adapter.my_method import scaled


def test_my_method_starts_at_the_linear_and_has_the_gradient_of_its_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    linear, factor = nn.Linear(4, 3, bias=False), nn.Parameter(torch.zeros(3))
    x, slope = torch.randn(5, 4, generator=draw), torch.randn(5, 3, generator=draw)
    plain = linear(x)
    scaled(linear, factor)
    # replace: your equations, as obvious as can be
    out = linear(x)
    assert torch.equal(out, plain)
    out.backward(slope)
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad, (slope * plain).sum(0).detach())
