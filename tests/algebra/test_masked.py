"""Least squares on a mask, against a dense solve of each row in float64."""

import torch

from lilliput.algebra import masked


def test_equals_a_solve_of_each_row_and_no_row_loses() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(9, 30, generator=g), torch.randn(200, 30, generator=g) @ torch.randn(30, 30, generator=g)
    h = x.T @ x + 5.0 * torch.eye(30)
    mask = torch.rand(9, 30, generator=g) < 0.5
    mask[0], mask[1] = True, False
    got = masked.refit(w, mask, h, 300)
    for row in range(9):
        kept = mask[row].nonzero().flatten()
        exact = torch.zeros(30, dtype=torch.float64)
        exact[kept] = torch.linalg.solve(h.double()[kept][:, kept], h.double()[kept] @ w[row].double())
        torch.testing.assert_close(got[row].double(), exact, rtol=0, atol=2e-3)
    before = masked.losses(w, w * mask, h)
    for steps in (0, 1, 2, 5, 20):
        after = masked.losses(w, masked.refit(w, mask, h, steps), h)
        assert bool((after <= before * (1 + 1e-4) + 1e-2).all())
        before = after
