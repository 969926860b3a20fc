"""LKD's step against its equations, written out in float64 on a block of one linear."""

from pathlib import Path

import torch

from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.methods.fit import lkd
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

BITS, GROUP, ROWS, WIDTH = 3, 8, 6, 24
TARGET = Target(bits=BITS, group_size=GROUP, symmetric=False, scale_dtype="float32")


def _fit(folder: Path, **options: object) -> tuple[BlockFit, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(ROWS, WIDTH, generator=g), torch.randn(4, 5, WIDTH, generator=g)
    stores = []
    for name, value in (("x", x), ("y", x @ w.T)):
        stores.append(Activations(folder / name, tuple(value.shape), torch.float32, create=True))
        stores[-1].write(0, value)
    linear = Linear("a", "other", "a", *w.shape)
    anatomy = Block((linear,), (Site("a", w.shape[1], ("a",), 0),), (), Groups())
    block = FitBlock(anatomy, {"a": Layer("a", w)}, lambda weights, h: h @ weights["a"].T)
    shared = {"batch": 4, "start": "minmax", "weigh": "alike", **options}
    io = FitIO({}, stores[0], stores[1], 2)
    return lkd.fit(block, io, {"a": TARGET}, lkd.Options.model_validate(shared)), w.double(), x.double()


def test_one_step_moves_weights_against_the_gradient(tmp_path: Path) -> None:
    done, w, x = _fit(tmp_path, iters=1, lr=0.4)
    unit = w.view(ROWS, -1, GROUP)
    low, high = unit.amin(2, keepdim=True).clamp(max=0), unit.amax(2, keepdim=True).clamp(min=0)
    top = 2**BITS - 1
    s = (high - low) / top
    z = (-low / s).round()
    u = (unit / s).requires_grad_()
    moved = u + (u.round() - u).detach()
    value = (s * ((moved + z).clamp(0, top) - z)).view(ROWS, WIDTH)
    ((x @ value.T - x @ w.T) ** 2).mean().backward()
    assert u.grad is not None
    # Adam's first step is the sign of the gradient times the rate.
    q = ((u.detach() - 0.4 * u.grad.sign()).round() + z).clamp(0, top)
    expected = (s * (q - z)).view(ROWS, WIDTH)
    start = ((x @ value.detach().T - x @ w.T) ** 2).mean()
    if ((x @ expected.T - x @ w.T) ** 2).mean() > start:  # the better state is kept
        expected = value.detach()
    assert torch.allclose(done.layers["a"].decode().double(), expected, atol=1e-5)


def test_the_loss_never_rises(tmp_path: Path) -> None:
    done, _, _ = _fit(tmp_path, iters=60)
    assert done.end < 0.9 * done.start
    (part,) = done.layers["a"].parts
    assert isinstance(part, QuantizedPart)
