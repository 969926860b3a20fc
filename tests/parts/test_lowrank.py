"""Factors as they are stored: exact sizes, exact decoding, and the right one fitted to the left one."""

from __future__ import annotations

import pytest
import torch

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError
from lilliput.parts import known
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, approximate, as_part, factor_spec, rest_of

NAMES: tuple[Factors, ...] = ("float16", "bfloat16", "float32", "int8", "int6", "int5", "int4", "int3", "int2")


def weight(rows: int = 12, width: int = 18) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_is_decoded(name: Factors) -> None:
    part = approximate(weight(), 5, factor_spec(name))
    spec, packed = part.spec, part.pack()
    assert known.from_plain(spec.plain()) == spec
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == spec.stored(12, 18)
    out = torch.zeros(12, 18)
    spec.add_to(out, packed.__getitem__)
    assert torch.equal(out, part.decode())
    left, right = spec.factors(packed.__getitem__, 12, 18, torch.empty(0))
    assert torch.equal(left @ right, out)
    bits = {"float16": 16, "bfloat16": 16, "float32": 32}.get(name) or int(name[3:])
    scales = 16 * (12 + 5) if name.startswith("int") else 0
    assert part.bits() == spec.size_bits(12, 18) == 5 * (12 + 18) * bits + scales
    assert torch.equal(part.rows(2, 7).decode(), part.decode()[2:7])


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_the_right_factor_makes_up_for_the_left_ones_rounding(name: Factors) -> None:
    """Nearer than both factors rounded by themselves, up to the right one's own rounding."""
    w, spec = weight(), factor_spec(name)
    part = approximate(w, 6, spec)
    found = lowrank.spectrum(w)
    left, right = found.basis[:, :6], found.basis[:, :6].T @ w.double()
    apart = as_part(left, spec).decode() @ as_part(right, spec).decode()
    assert lowrank.squared(w - part.decode()) < lowrank.squared(w - apart)


def test_split_says_who_carries_the_singular_values() -> None:
    w, spec = weight(), factor_spec("float32")
    even, right = (approximate(w, 6, spec, split=s) for s in ("even", "right"))
    torch.testing.assert_close(even.decode(), right.decode(), rtol=1e-4, atol=1e-5)
    u = right.left.decode()
    torch.testing.assert_close(u.T @ u, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(even.left.decode().norm(dim=0), even.right.decode().norm(dim=1), rtol=1e-4, atol=1e-5)


def test_factors_beyond_a_types_range_and_pruned_layers_are_refused() -> None:
    with pytest.raises(LilliputError, match="exceeds the range of float16: set factors"):
        approximate(weight() * 1e10, 3, factor_spec("float16"))
    assert bool(torch.isfinite(approximate(weight() * 1e10, 3, factor_spec("bfloat16")).decode()).all())
    assert torch.equal(rest_of(Layer("x", weight())), weight())
    with pytest.raises(LilliputError, match="x is pruned"):
        rest_of(Layer("x", weight(), support=weight() > 0))
