"""Grids under training against their equations in float64, and against the formats' own encoding."""

import pytest
import torch
from torch import Tensor

from lilliput.formats.binary import BinaryFormat
from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.known import from_target
from lilliput.formats.sign import SignFormat
from lilliput.formats.ternary import TernaryFormat
from lilliput.target import Target
from lilliput.training import grids

ROWS, WIDTH = 6, 256
FORMATS: dict[str, Format] = {
    "int4-sym": IntegerFormat(4, True, 32),
    "int3-asym": IntegerFormat(3, False, 32),
    "int4-uneven": IntegerFormat(4, False, 48),
    "int4-row": IntegerFormat(4, True, -1),
    "int4-tensor": IntegerFormat(4, False, 0),
    "ternary": TernaryFormat(32),
    "binary2": BinaryFormat(2, 32),
    "binary1": BinaryFormat(1, -1),
    "sign": SignFormat(),
    **{
        name: from_target(Target(format=name, bits=4 if name == "nf" else None, group_size="auto"))
        for name in ("q4_0", "q4_1", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs")
    },
    **{
        f"{name}/{kind}": from_target(Target(format=name, bits=bits, group_size=32, scale_dtype=kind))
        for name, bits, kind in (
            ("nf", 4, "float16"),
            ("nf", 3, "int8/256"),
            ("nf", 3, "int4/row"),
            ("e2m1", 4, "e8m0"),
            ("e2m1", 4, "e4m3"),
        )
    },
}


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_start_is_what_the_format_says(form: Format) -> None:
    w = _weight()
    grid = form.fit(w)
    codes = form.encode(w, grid)
    tuned = grids.of(form, grid, WIDTH)
    held = form.decode(codes, grid)
    assert torch.equal(grids.meant(tuned, tuned.numbers(), codes=codes), held)
    assert torch.equal(grids.meant(tuned, tuned.numbers(), latent=w), held)
    assert torch.equal(grids.meant(tuned, tuned.numbers(), latent=held), held)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_moved_numbers_are_those_that_a_file_holds(form: Format) -> None:
    w = _weight()
    tuned = grids.of(form, form.fit(w), WIDTH)
    moved = {name: x * 1.1 if name in tuned.positive else x + 0.7 for name, x in tuned.numbers().items()}
    grid = tuned.closed(moved)
    value = grids.meant(tuned, moved, latent=w)
    get = form.pack(form.encode(w, grid), grid).__getitem__
    assert torch.equal(form.decode(*form.unpack(get, ROWS, WIDTH, 0, ROWS)), value)


def _soft(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(round(x)), rounding with the gradient of the identity, clipping with torch's own."""
    return torch.clamp(x + (x.round() - x).detach(), low, high)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_integers_are_those_of_lsq(symmetric: bool) -> None:
    form = IntegerFormat(3, symmetric, 32, torch.float32)
    w = _weight()
    tuned = grids.of(form, form.fit(w * 0.6), WIDTH)  # some weights lie outside the window
    numbers = {name: x.clone().requires_grad_() for name, x in tuned.numbers().items()}
    latent = w.clone().requires_grad_()
    slope = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    value = grids.meant(tuned, numbers, latent=latent)
    (value * slope).sum().backward()

    s = tuned.numbers()["scale"].double().requires_grad_()
    z = tuned.numbers().get("zero", torch.zeros_like(s)).double().requires_grad_()
    u = w.double().requires_grad_()
    each = u.view(ROWS, -1, 32) / s[..., None]
    low, high = (form.lowest - z)[..., None], (form.highest - z)[..., None]
    reference = (s[..., None] * _soft(each, low, high)).view(ROWS, WIDTH)
    assert torch.allclose(reference.float(), value, atol=1e-6)
    assert bool((value - w).abs().amax() > s.amax())
    (reference * slope.double()).sum().backward()
    assert latent.grad is not None
    assert u.grad is not None
    assert s.grad is not None
    assert torch.equal(latent.grad, u.grad.float())
    assert torch.allclose(numbers["scale"].grad.double(), s.grad, rtol=1e-4, atol=1e-4)
    if not symmetric:
        assert torch.allclose(numbers["zero"].grad.double(), z.grad, rtol=1e-4, atol=1e-5)


def test_the_step_of_a_smooth_surrogate_has_lsqs_slope() -> None:
    """With what rounding adds and what is clipped held fixed, differences agree with the equations."""
    form = IntegerFormat(3, True, -1, torch.float32)
    w = _weight()[:1]
    tuned = grids.of(form, form.fit(w * 0.6), WIDTH)
    scale = tuned.numbers()["scale"].clone().requires_grad_()
    (grids.meant(tuned, {"scale": scale}, latent=w)).sum().backward()
    s0, w64 = float(tuned.numbers()["scale"]), w.double()
    u0 = w64 / s0
    gap, code = u0.round() - u0, u0.round().clamp(form.lowest, form.highest)
    inside = u0.round() == code
    assert 0 < int(inside.sum()) < WIDTH

    def smooth(s: float) -> float:
        return float(torch.where(inside, s * (w64 / s + gap), s * code).sum())

    h = 1e-6
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((smooth(s0 + h) - smooth(s0 - h)) / (2 * h), rel=1e-4)


def test_levels_pass_gradients_between_the_outermost() -> None:
    form = FORMATS["nf/float16"]
    w = _weight()
    tuned = grids.of(form, form.fit(w * 0.5), WIDTH)
    latent = w.clone().requires_grad_()
    grids.meant(tuned, tuned.numbers(), latent=latent).sum().backward()
    scale = tuned.numbers()["scale"].repeat_interleave(32, 1)
    assert latent.grad is not None
    assert torch.equal(latent.grad, (w.abs() <= scale).float())


def test_alphas_and_signs_have_the_slopes_of_their_sums() -> None:
    w = _weight()
    slope = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    binary = FORMATS["binary2"]
    tuned = grids.of(binary, binary.fit(w), WIDTH)
    codes = binary.encode(w, tuned.start)
    numbers = {name: x.clone().requires_grad_() for name, x in tuned.numbers().items()}
    (grids.meant(tuned, numbers, codes=codes) * slope).sum().backward()
    whole = codes.long() + 2
    for i in range(2):
        expected = (slope * ((whole >> i & 1) * 2 - 1)).view(ROWS, -1, 32).sum(2)
        assert torch.allclose(numbers["alpha"].grad[..., i], expected, atol=1e-5)
    assert torch.allclose(numbers["offset"].grad, slope.view(ROWS, -1, 32).sum(2), atol=1e-5)

    sign = FORMATS["sign"]
    tuned = grids.of(sign, sign.fit(w), WIDTH)
    numbers = {name: x.clone().requires_grad_() for name, x in tuned.numbers().items()}
    latent = w.clone().requires_grad_()
    (grids.meant(tuned, numbers, latent=latent) * slope).sum().backward()
    left, right = (tuned.numbers()[x].double() for x in ("left", "right"))
    assert torch.allclose(numbers["left"].grad.double(), (slope.double() * w.sign() * right).sum(1), atol=1e-4)
    assert torch.allclose(numbers["right"].grad.double(), (slope.double() * w.sign() * left[:, None]).sum(0), atol=1e-4)
    factor = (1.001 - w.double().tanh() ** 2) * left[:, None] * right
    assert latent.grad is not None
    assert torch.allclose(latent.grad.double(), slope.double() * factor, atol=1e-6)


def test_ternary_grids_taken_anew_have_the_threshold_of_twn() -> None:
    form = TernaryFormat(32, torch.float32)
    w = _weight()
    grid, encoded = grids.of(form, form.fit(w), WIDTH).anew(w)
    for row in range(ROWS):
        for g in range(WIDTH // 32):
            x = w[row, 32 * g : 32 * g + 32].double()
            delta = 0.7 * x.abs().mean()
            alpha = x.abs()[x.abs() > delta].mean()
            expected = alpha * x.sign() * (x.abs() > delta)
            assert torch.allclose(
                form.decode(form.encode(encoded, grid), grid)[row, 32 * g : 32 * g + 32].double(), expected
            )
