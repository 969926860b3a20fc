"""Integers or floats of equal width for each matrix, beside both of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.either import EitherFormat, EitherGrid
from lilliput.methods.weight.mofq_weights import Options, compress, scheme
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

WIDTH = 64


def seen() -> SiteStats:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(300, WIDTH, generator=draw) @ torch.randn(WIDTH, WIDTH, generator=draw)
    return fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    even, heavy = torch.rand(24, WIDTH, generator=draw) * 2 - 1, torch.randn(24, WIDTH, generator=draw)
    return {"even": even, "heavy": heavy.sign() * heavy.abs() ** 9}


def target(bits: int, group: int | str = "channel") -> Target:
    return Target(bits=bits, group_size=group, scale_dtype="float16")  # type: ignore[arg-type]


def made(weight: Tensor, wanted: Target, measure: str) -> QuantizedPart:
    (part,) = compress(Layer("x", weight), seen(), wanted, Options(measure=measure)).parts  # type: ignore[arg-type]
    assert isinstance(part, QuantizedPart)
    return part


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("measure", ["weights", "outputs"])
def test_it_loses_as_little_as_the_better_of_both(bits: int, measure: str) -> None:
    gram, chosen = seen().need("gram").double(), {}
    importance = seen().second_moment() if measure == "outputs" else None
    for name, weight in weights().items():
        part = made(weight, target(bits), measure)
        form = part.format
        assert isinstance(form, EitherFormat)

        def loss(decoded: Tensor, weight: Tensor = weight) -> float:
            change = (decoded - weight).double()
            return float((change.square() if measure == "weights" else (change @ gram) * change).sum())

        both = []
        for one in (form.integers, form.floats):
            grid = one.fit(weight, search="mse", importance=importance)  # type: ignore[arg-type]
            both.append(loss(one.decode(one.encode(weight, grid), grid)))  # type: ignore[arg-type]
        assert loss(part.decode()) == pytest.approx(min(both), rel=1e-6)
        chosen[name] = part.grid.floats
    assert chosen == {"even": False, "heavy": True}


@pytest.mark.parametrize("group", ["channel", "tensor", 16])
def test_what_is_stored_is_what_is_read(group: int | str) -> None:
    for weight in weights().values():
        part = made(weight, target(4, group), "weights")
        form, rows = part.format, len(weight)
        tensors = part.pack()
        assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == form.stored(rows, WIDTH)
        assert sum(8 * t.numel() * t.element_size() for t in tensors.values()) == form.size_bits(rows, WIDTH)
        for start, stop in ((0, rows), (5, 11)):
            codes, grid = form.unpack(tensors.__getitem__, rows, WIDTH, start, stop)
            assert isinstance(grid, EitherGrid)
            assert torch.equal(form.decode(codes, grid), part.decode()[start:stop])
            assert torch.equal(part.rows(start, stop).decode(), part.decode()[start:stop])


def test_its_own_fit_takes_the_better_one() -> None:
    form = EitherFormat(4, -1, torch.float16)
    assert [form.fit(x).floats for x in weights().values()] == [False, True]


@pytest.mark.parametrize(
    ("wrong", "says"), [({"bits": 5}, "4, 6 or 8"), ({"bits": 4, "symmetric": False}, "zero points")]
)
def test_what_has_no_float_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        scheme(target(4).model_copy(update=wrong), Options(), 8, WIDTH)
