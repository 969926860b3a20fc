"""Rounding with gradients: the values of the format, the gradients of the equations."""

import pytest
import torch
from torch import Tensor

from lilliput.formats import ggml
from lilliput.formats.ggml_bytes import KINDS
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.rounding import Units, encode, rounded, stored

CASES = [(4, False, 8), (3, True, 8), (2, False, 7), (4, True, -1), (3, False, 0), (8, False, 50)]


def _plain(position: Tensor, scale: Tensor, zero: Tensor, units: Units) -> Tensor:
    """The same with torch's own operations: clamp has the gradient, and round is told to hand it on."""
    spread = units.form.group_of(units.width)
    s, z = (x.expand(units.rows, -1)[:, spread] for x in (scale, zero))
    whole = position + (position.round() - position).detach() + z
    return (torch.clamp(whole, units.form.lowest, units.form.highest) - z) * s


@pytest.mark.parametrize(("bits", "symmetric", "group"), CASES)
def test_values_and_gradients(bits: int, symmetric: bool, group: int) -> None:
    g = torch.Generator().manual_seed(bits)
    form = IntegerFormat(bits, symmetric, group)
    w = torch.randn(6, 40, generator=g)
    grid = form.fit(w, search="mse")  # clips
    units = Units(form, *w.shape)
    assert units.shape == tuple(grid.scale.shape)
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    leaves = [w / units.spread(scale), scale, zero]
    ours = [x.clone().requires_grad_() for x in leaves]
    theirs = [x.double().requires_grad_() for x in leaves]
    a, b = rounded(ours[0], ours[1], ours[2], units), _plain(theirs[0], theirs[1], theirs[2], units)
    assert torch.equal(a, form.decode(*encode(ours[0].detach(), scale, zero, units, grid)))
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    slope = torch.randn(6, 40, generator=g)
    a.backward(slope)
    b.backward(slope.double())
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        # At the very edge of the window torch's clamp passes gradients too; positions there are not hit by chance.
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)


def test_a_scale_is_shown_as_it_is_stored() -> None:
    scale = torch.tensor([[0.1, 1e-12]], requires_grad=True)
    units = Units(IntegerFormat(4, True, 8, torch.float16), 1, 16)
    shown, _ = stored(scale, torch.zeros(1, 2), units, None)
    assert torch.equal(shown.detach(), torch.tensor([[0.1, 2.0**-24]], dtype=torch.float16).float())
    shown.sum().backward()
    assert torch.equal(scale.grad, torch.ones(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_grids_of_ggml(name: str) -> None:
    """What is trained is what is stored: values to a float32's rounding, grids exactly, scales moved by a step."""
    g = torch.Generator().manual_seed(0)
    form = ggml.format_of(name)
    w = torch.randn(4, 512, generator=g)
    grid = form.fit(w)
    units = Units(form, *w.shape)
    scale, zero = form.opened(grid)
    codes = form.encode(w, grid)
    centred = codes - units.spread(zero)
    leaves = [x.clone().requires_grad_() for x in (centred, scale, zero)]
    shown = rounded(*leaves, units)
    torch.testing.assert_close(shown, form.decode(codes, grid), rtol=0, atol=1e-6)
    again = encode(centred, scale, zero, units, grid)
    assert torch.equal(again[0], codes)
    torch.testing.assert_close(form.decode(*again), form.decode(codes, grid), rtol=0, atol=0)
    slope = torch.randn(w.shape, generator=g)
    shown.backward(slope)  # type: ignore[no-untyped-call]
    position, by_scale, _ = (x.grad for x in leaves)
    assert position is not None
    assert by_scale is not None
    assert torch.equal(position, slope * units.spread(scale))
    meant = shown.detach() / units.spread(scale)
    torch.testing.assert_close(by_scale, units.gather(slope * meant), rtol=1e-4, atol=1e-4)
    moved = stored(scale * 1.2, zero, units, grid)
    near = form.opened(form.closed(*moved, grid))
    torch.testing.assert_close(moved, near, rtol=1e-3, atol=1e-3)
    assert float((moved[0] / scale).mean()) > 1.02
