"""Binary coding as a method: greedy and alternating as printed, the sweep over its sums, its limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.binary import BinaryFormat
from lilliput.methods.weight import bcq, ternary
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 12, width: int = 48, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(300, width, generator=g) @ mix / width**0.5
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, 300, gram=x.T @ x)


def _target(bits: int = 3, group: int | str = "channel") -> Target:
    return Target(format="binary", bits=bits, group_size=group, scale_dtype="float32")


def _part(layer: Layer) -> QuantizedPart:
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    return part


def _loss(w: Tensor, layer: Layer, stats: SiteStats) -> float:
    d = (w - layer.decode()).double()
    return float(((d @ stats.need("gram").double()) * d).sum())


def _greedy(row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    z = row.mean()
    left, alphas = row - z, []
    for _ in range(bits):
        signs = torch.where(left < 0, -1.0, 1.0).double()
        alphas.append(left.abs().mean())
        left = left - alphas[-1] * signs
    return torch.stack(alphas), z


def _slow(row: Tensor, bits: int, rounds: int) -> float:
    """The squared error of one row after greedy and alternation, kept only where it falls."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits))).double()
    alpha, z = _greedy(row, bits)

    def nearest(alpha: Tensor, z: Tensor) -> tuple[Tensor, float]:
        sums = signs @ alpha + z
        pick = (row.unsqueeze(1) - sums).abs().argmin(1)
        return signs[pick], float((row - sums[pick]).square().sum())

    codes, best = nearest(alpha, z)
    for _ in range(rounds):
        design = torch.cat([codes, torch.ones(len(row), 1).double()], 1)
        solved = torch.linalg.lstsq(design, row.unsqueeze(1), driver="gelsd").solution[:, 0]
        found, error = nearest(solved[:-1], solved[-1])
        if error >= best:
            break
        codes, best = found, error
    return best


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_greedy_and_alternation_are_as_printed(bits: int) -> None:
    """The error of every row to 1e-3."""
    w, stats = _case()
    if bits == 1:  # the target of a recipe has at least two bits; the format has one
        form = BinaryFormat(1, -1, torch.float32)
        grid = form.fit(w, start="greedy")
        back = form.decode(form.encode(w, grid), grid)
    else:
        o = bcq.Options(start="greedy", importance=False, sweep=False)
        back = bcq.compress(Layer("x", w), stats, _target(bits), o).decode()
    ours = (back - w).double().square().sum(1)
    slow = torch.tensor([_slow(row.double(), bits, 15) for row in w], dtype=torch.float64)
    torch.testing.assert_close(ours, slow, rtol=1e-3, atol=0)


def test_the_sweep_lowers_the_loss_of_the_same_sums() -> None:
    w, stats = _case()
    for bits in (2, 3):
        swept, plain = (
            bcq.compress(Layer("x", w), stats, _target(bits, 16), bcq.Options(sweep=sweep)) for sweep in (True, False)
        )
        assert torch.equal(_part(swept).grid.alpha, _part(plain).grid.alpha)
        assert _loss(w, swept, stats) < 0.8 * _loss(w, plain, stats)


def test_uncorrelated_inputs_leave_the_sweep_nothing_to_do() -> None:
    w, _ = _case()
    stats = SiteStats(48, 9, gram=torch.eye(48) * 3)
    codes = [_part(bcq.compress(Layer("x", w), stats, _target(), bcq.Options(sweep=s))).codes for s in (True, False)]
    assert torch.equal(*codes)


def test_importance_and_needs() -> None:
    w, stats = _case()
    weigh = stats.need("gram").diagonal()

    def weighted(importance: bool) -> float:
        layer = bcq.compress(Layer("x", w), stats, _target(2), bcq.Options(sweep=False, importance=importance))
        return float(((w - layer.decode()).square() * weigh).sum())

    assert weighted(True) < 0.9 * weighted(False)
    assert bcq.needs(bcq.Options(sweep=False, importance=False)) == ()
    assert ternary.needs(ternary.Options(sweep=False, importance=False)) == ()
    assert bcq.needs(bcq.Options(sweep=False)) == ("gram",)


def test_pruned_layers_are_refused() -> None:
    w, stats = _case()
    with pytest.raises(PlanError, match="no code for 0"):
        bcq.compress(Layer("x", w, support=w > 0), stats, _target(), bcq.Options())


def test_ternary_sweeps_too() -> None:
    w, stats = _case(24)
    target = Target(format="ternary", group_size=16)
    plain = ternary.compress(Layer("x", w), stats, target, ternary.Options(sweep=False))
    swept = ternary.compress(Layer("x", w), stats, target, ternary.Options())
    assert set(_part(swept).codes.flatten().tolist()) == {-1, 0, 1}
    assert torch.equal(_part(swept).grid.scale, _part(plain).grid.scale)
    assert _loss(w, swept, stats) < 0.8 * _loss(w, plain, stats)
    scale = _part(plain).grid.scale.float().repeat_interleave(16, 1)
    assert torch.equal(plain.decode(), torch.where(w.abs() > scale / 2, scale * w.sign(), 0.0))
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    for sweep in (True, False):
        out = ternary.compress(Layer("x", w, support=mask), stats, target, ternary.Options(sweep=sweep))
        assert bool((out.decode()[~mask] == 0).all())
