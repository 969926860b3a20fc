"""Distributions of which the rest is one event, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.algebra.divergences import bucketed


@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("named", [1, 5, 11])
def test_the_rest_is_one_event(spread: float, named: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 12, generator=draw) * spread).requires_grad_()
    ids = torch.rand(7, 12, generator=draw).argsort(1)[:, :named]
    weights = torch.rand(7, named + 1, generator=draw)
    exact = logits.detach().double().requires_grad_()
    log_q = exact.log_softmax(-1)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    expected = torch.cat([log_q.gather(1, ids), rest], 1)
    found = bucketed(logits, ids)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * spread)
    (slope,) = torch.autograd.grad((found * weights).sum(), logits)
    (expected_slope,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-4, atol=1e-5)
