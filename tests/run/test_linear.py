"""What leaves a block can be held in the model's own dtype, whatever its grid makes of the largest weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.errors import LilliputError
from lilliput.parts.layer import Layer
from lilliput.run.linear import fits, lowered, within
from lilliput.stats.site import SiteStats
from lilliput.target import Target

TOP = torch.finfo(torch.float16).max
ROWS, WIDTH = 8, 64


def layer() -> Layer:
    """Ordinary weights, and in two rows the largest numbers of float16."""
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).half().float()
    weight[2, 3], weight[5, 7] = TOP, -TOP
    return Layer("a", weight)


def rounded(some: Layer, **target: object) -> Layer:
    rtn = methods.get("rtn")
    wanted = rtn.spec.completed(
        Target.model_validate({"bits": 4, "group_size": 32, "scale_dtype": "float16", **target})
    )
    done: Layer = rtn.spec.run(some, SiteStats(WIDTH, 0), wanted, rtn.parse({}))
    return done


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ({}, 0.02),
        ({"bits": 8}, 0.02),
        ({"bits": 2}, 0.02),
        ({"symmetric": False, "bits": 3}, 0.02),
        ({"group_size": "tensor"}, 0.02),
        ({"format": "nf4"}, 0.02),
        ({"format": "affine"}, 0.02),
        ({"format": "mxfp4", "scale_dtype": "e8m0"}, 0.26),  # the next larger level is 65536
    ],
)
def test_the_largest_weights_decode_to_numbers(target: dict[str, object], near: float) -> None:
    before = layer()
    done = within(before, torch.float16, lambda x: rounded(x, **target))
    decoded = done.decode().half()
    assert torch.isfinite(decoded).all()
    for place in ((2, 3), (5, 7)):
        assert float(decoded[place]) == pytest.approx(float(before.weight[place]), rel=near)
    assert done.weight is before.weight  # errors are measured against the weight as it is


def test_without_need_nothing_changes() -> None:
    small = Layer("a", layer().weight.clamp(-4, 4))
    for some, dtype in ((small, torch.float16), (layer(), torch.bfloat16), (layer(), torch.float32)):
        plain, done = rounded(some), within(some, dtype, rounded)
        assert torch.equal(done.decode(), plain.decode())
    assert not fits(rounded(layer()).decode(), torch.float16)  # the case is one


def test_a_result_that_no_smaller_weight_mends_is_named() -> None:
    def far(some: Layer) -> Layer:
        return Layer(some.name, some.weight * 8)

    with pytest.raises(LilliputError, match=r"a would decode to numbers beyond float16, .*exclude"):
        within(layer(), torch.float16, far)


def test_fits_may_move_a_code_by_one() -> None:
    def moved(some: Layer) -> Tensor:
        part = rounded(some).parts[0]
        codes = (part.codes.int() + part.codes.sign()).clamp(-8, 7).to(torch.int8)
        out: Tensor = part.format.decode(codes, part.grid)
        return out

    assert not fits(moved(layer()), torch.float16)
    assert fits(moved(lowered(layer(), torch.float16)), torch.float16)
    assert lowered(layer(), torch.bfloat16).weight.max() == TOP


@pytest.mark.parametrize(("value", "held"), [(65504.0, True), (65519.0, True), (65520.0, False), (float("nan"), False)])
def test_what_float16_holds(value: float, held: bool) -> None:
    """Halfway to the next power of two and beyond, rounding gives infinity."""
    assert fits(torch.tensor([[1.0, -value]]), torch.float16) is held
    assert bool(torch.isfinite(torch.tensor(-value).half())) is held
