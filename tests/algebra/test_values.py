"""The sweep on values against the sweep on codes and a slow one."""

import torch
from torch import Tensor

from lilliput.algebra import obs, values
from lilliput.methods.weight import gptq
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 10, width: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=g) @ torch.randn(width, width, generator=g)
    return torch.randn(rows, width, generator=g), x.T @ x / 300


def _slow(w: Tensor, gram: Tensor, order: list[int], levels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As GPTQ prints it, in float64: values, targets and 1 / U_jj^2; `levels` [out, in, count]."""
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    work, out, aims = w.double().clone(), torch.zeros_like(w).double(), torch.zeros_like(w).double()
    for n, j in enumerate(order):
        aims[:, j] = work[:, j]
        near = (levels[:, j].double() - work[:, j : j + 1]).abs().argmin(1, keepdim=True)
        out[:, j] = torch.where(kept[:, j], work[:, j], levels[:, j].double().gather(1, near).squeeze(1))
        work[:, order[n:]] -= ((work[:, j] - out[:, j]) / u[n, n]).unsqueeze(1) * u[n, n:]
    pivot = torch.empty(len(h), dtype=torch.float64)
    pivot[order] = 1 / u.diagonal().square()
    return out, aims, pivot


def test_levels_and_kept_weights_equal_the_printed_sweep() -> None:
    w, gram = _case()
    levels = torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(1)).sort(-1).values  # groups of 8
    kept = torch.rand(10, 40, generator=torch.Generator().manual_seed(2)) < 0.2
    for order in (None, gram.diagonal().argsort(descending=True)):
        slots = list(range(40)) if order is None else order.tolist()
        factor = obs.factorize(gram, 0.01, order)

        def rounding(a: int, b: int, slots: list[int] = slots) -> obs.Nearest:
            inner = values.Levels.of(levels[a:b], [j // 8 for j in slots])
            return values.Kept.of(inner, kept[a:b, slots].T)

        aims = torch.empty_like(w)
        found = values.sweep(w, factor, order, rounding, block=16, targets=aims)
        slow, wanted, curve = _slow(w, gram, slots, levels[:, torch.arange(40) // 8], kept)
        torch.testing.assert_close(found.double(), slow, rtol=0, atol=2e-3)
        torch.testing.assert_close(aims.double(), wanted, rtol=0, atol=2e-3)
        d = w.double() - slow
        h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
        loss = ((d @ h) * d).sum()
        torch.testing.assert_close(((wanted - slow).square() * curve).sum(), loss, rtol=1e-9, atol=0)


def test_a_common_step_gives_the_codes_of_gptq() -> None:
    w, gram = _case()
    mask = torch.rand(10, 40, generator=torch.Generator().manual_seed(2)) < 0.7
    target = Target(bits=3, group_size=8, symmetric=False)
    layer = gptq.compress(Layer("x", w, support=mask), SiteStats(40, 1, gram=gram), target, gptq.Options(shrinkage=0.0))
    (part,) = layer.parts
    order = gram.diagonal().argsort(descending=True, stable=True)

    def rounding(a: int, b: int) -> obs.Nearest:
        grid = part.grid.rows(a, b)  # type: ignore[attr-defined]
        return obs.Rounding.of(grid.scale, grid.zero, 3, b - a, [j // 8 for j in order.tolist()])

    found = values.sweep(w, obs.factorize(gram, 0.01, order), order, rounding, support=mask)
    torch.testing.assert_close(found, layer.decode(), rtol=1e-6, atol=1e-7)
