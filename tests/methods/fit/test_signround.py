"""SignRound's step against its equations, written out in float64 on a block of one linear."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.formats import ggml
from lilliput.methods.fit import adaround, flexround, signround
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.view import FitBlock, FitIO

BITS, GROUP, ROWS, WIDTH = 3, 8, 6, 24
TARGET = Target(bits=BITS, group_size=GROUP, symmetric=False, scale_dtype="float32")


@pytest.fixture
def case(tmp_path: Path) -> tuple[FitBlock, FitIO, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g)
    x = torch.randn(4, 5, WIDTH, generator=g)
    return *_block(w, x, tmp_path), w.double(), x.double()


def _block(w: Tensor, x: Tensor, folder: Path) -> tuple[FitBlock, FitIO]:
    """A block of one linear, and its inputs and outputs."""
    stores = []
    for name, value in (("x", x), ("y", x @ w.T)):
        stores.append(Activations(folder / name, tuple(value.shape), torch.float32, create=True))
        stores[-1].write(0, value)
    linear = Linear("a", "other", "a", *w.shape)
    anatomy = Block((linear,), (Site("a", w.shape[1], ("a",), 0),), (), Groups())
    block = FitBlock(anatomy, {"a": Layer("a", w)}, lambda weights, h: h @ weights["a"].T)
    return block, FitIO({}, stores[0], stores[1], 2)


def _fit(module: object, case: tuple[FitBlock, FitIO, Tensor, Tensor], **options: object) -> QuantizedPart:
    shared = {"iters": 1, "batch": 4, "start": "minmax", "weigh": "alike", **options}
    done = module.fit(case[0], case[1], {"a": TARGET}, module.Options.model_validate(shared))  # type: ignore[attr-defined]
    (part,) = done.layers["a"].parts
    assert isinstance(part, QuantizedPart)
    return part


def _units(w: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, 0 included: [rows, groups, 1]."""
    unit = w.view(ROWS, -1, GROUP)
    return unit.amin(2, keepdim=True).clamp(max=0), unit.amax(2, keepdim=True).clamp(min=0)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _model(w: Tensor, v: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """What = S (clip(round(W / S + V) + Z, 0, 2^b - 1) - Z) with torch's own gradients; range of the min-max grid."""
    lo, hi = _units(w)
    top = 2**BITS - 1
    step = (hi - lo) / top
    first = torch.round(-lo / step)  # ends of the codes' window, which the factors move
    s = (upper * (top - first) * step + lower * first * step) / top
    z = _round(lower * first * step / s)
    q = torch.clamp(_round(w.view(ROWS, -1, GROUP) / s + v) + z, 0, top)
    return (s * (q - z)).view(ROWS, WIDTH)


def test_one_signed_step(case: tuple[FitBlock, FitIO, Tensor, Tensor]) -> None:
    """V, a and b after one step of length 0.03 and 0.02, which changes codes: the equations' weights to 1e-5."""
    _, _, w, x = case
    shape = (ROWS, WIDTH // GROUP, 1)
    v = torch.zeros(ROWS, WIDTH // GROUP, GROUP, dtype=torch.float64, requires_grad=True)
    upper, lower = (torch.ones(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    before = ((x @ (_model(w, v, upper, lower) - w).T) ** 2).mean()
    before.backward()
    assert v.grad is not None
    assert upper.grad is not None
    assert lower.grad is not None
    with torch.no_grad():
        moved = (-0.03 * v.grad.sign()).clamp(-0.5, 0.5)
        a, b = ((1 - 0.02 * t.grad.sign()).clamp(max=1.0) for t in (upper, lower))  # type: ignore[union-attr]
        expected = _model(w, moved, a, b)
        after = ((x @ (expected - w).T) ** 2).mean()
    part = _fit(signround, case, lr=0.03, minmax_lr=0.02)
    still = _model(w, torch.zeros_like(v), a, b)
    assert not torch.allclose(expected, still)
    assert float(after) < float(before.detach())  # else the start would have been kept
    torch.testing.assert_close(part.decode().double(), expected, rtol=1e-5, atol=1e-5)


def test_adaround_rounds_to_one_of_the_two_neighbours(case: tuple[FitBlock, FitIO, Tensor, Tensor]) -> None:
    """floor(W / S) or the next, inside the window; more of the output is right than by rounding to nearest."""
    _, _, w, x = case
    part = _fit(adaround, case, iters=100, weight=0.5)
    lo, hi = _units(w)
    step = (hi - lo) / (2**BITS - 1)
    zero = torch.round(-lo / step) - 2 ** (BITS - 1)
    below = torch.floor(w.view(ROWS, -1, GROUP) / step)
    code = part.codes.double().view(ROWS, -1, GROUP) - zero
    assert bool(((code == below) | (code == below + 1) | (part.codes.view_as(code).abs() >= 3)).all())
    nearest = _model(w, torch.zeros(ROWS, 3, GROUP).double(), torch.ones(ROWS, 3, 1), torch.ones(ROWS, 3, 1))
    loss = [float(((x @ (q - w).T) ** 2).mean()) for q in (part.decode().double(), nearest)]
    assert loss[0] < 0.9 * loss[1]


def test_flexround_divides_before_it_rounds(case: tuple[FitBlock, FitIO, Tensor, Tensor]) -> None:
    """One step of Adam moves every factor by lr against its gradient's sign: What = S round(W / (S S2 s3))."""
    _, _, w, x = case
    lo, hi = _units(w)
    top, low = 2**BITS - 1, 2 ** (BITS - 1)
    step = (hi - lo) / top
    zero = torch.round(-lo / step)
    each = torch.ones(ROWS, WIDTH // GROUP, GROUP, dtype=torch.float64, requires_grad=True)
    row = torch.ones(ROWS, 1, 1, dtype=torch.float64, requires_grad=True)
    scale = torch.ones_like(step, requires_grad=True)

    def model() -> Tensor:
        s = step * scale
        q = torch.clamp(_round(w.view(ROWS, -1, GROUP) / (s * each * row)) + zero, 0, top)
        return (s * (q - zero)).view(ROWS, WIDTH)

    ((x @ (model() - w).T) ** 2).mean().backward()
    with torch.no_grad():
        for leaf in (each, row, scale):
            assert leaf.grad is not None
            leaf -= 0.03 * leaf.grad.sign()
        expected = model()
    assert low == 4
    part = _fit(flexround, case, lr=0.03)
    loss = [float(((x @ (q - w).T) ** 2).mean()) for q in (expected, _fit(flexround, case, iters=0).decode().double())]
    assert loss[0] < loss[1]
    torch.testing.assert_close(part.decode().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q3_k", "q6_k", "iq4_xs", "tq2_0"])
def test_blocks_of_ggml(name: str, tmp_path: Path) -> None:
    """Further down than their own start, with offsets, integers under a step and uneven levels alike."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(8, 256, generator=g)
    x = torch.randn(4, 16, 32, generator=g) @ torch.randn(32, 256, generator=g)
    block, io = _block(w, x, tmp_path)
    o = signround.Options(iters=20, batch=4)
    done = signround.fit(block, io, {"a": Target(format=name)}, o)
    (part,) = done.layers["a"].parts
    assert isinstance(part, QuantizedPart)
    assert part.format == ggml.format_of(name)
    assert done.end < 0.9 * done.start
    again = part.format.unpack(lambda suffix: part.format.pack(part.codes, part.grid)[suffix], 8, 256, 0, 8)
    assert torch.equal(part.format.decode(*again), part.decode())
