from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.errors import PlanError
from lilliput.methods import get
from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.per_token import PerTokenSpec

SHAPE = CacheShape(2, 16, 8)


def rounded(x: Tensor, bits: int, group: int) -> Tensor:
    """kv-rtn by its equations, float64, group by group; m and s as float16 holds them."""
    out = torch.empty_like(x, dtype=torch.float64)
    flat, where = x.double().reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    for row in range(len(flat)):
        for start in range(0, x.shape[-1], group):
            part = [float(v) for v in flat[row, start : start + group]]
            low = float(torch.tensor(min(part)).half())
            step = float(torch.tensor((max(part) - min(part)) / (2**bits - 1), dtype=torch.float32).half())
            for n, value in enumerate(part):
                code = 0 if step == 0 else min(2**bits - 1, max(0, round((value - low) / step)))
                where[row, start + n] = code * step + low
    return out


def text(tokens: int = 9) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, tokens, 16, generator=draw) * 3 + 1, torch.randn(2, 2, tokens, 8, generator=draw)


@pytest.mark.parametrize(("bits", "group"), [(8, 8), (4, 4), (3, 8), (2, 2)])
def test_it_is_what_the_equations_say(bits: int, group: int) -> None:
    keys, values = text()
    codec = PerTokenSpec(bits, bits, group).make(SHAPE, {})
    codec.append(keys, values, Incoming())
    for found, x in zip(codec.materialise(), (keys, values), strict=True):
        torch.testing.assert_close(found.double(), rounded(x, bits, group), rtol=1e-6, atol=1e-6)


def test_a_rotation_goes_before_and_its_transpose_after() -> None:
    keys, values = text()
    codec = PerTokenSpec(4, 4, 8, rotate=True).make(SHAPE, {})
    codec.append(keys, values, Incoming())
    for found, x in zip(codec.materialise(), (keys, values), strict=True):
        turn = hadamard.matrix(x.shape[-1])
        expected = rounded((x.double() @ turn).float(), 4, 8) @ turn.T
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_rotation_spreads_a_large_channel() -> None:
    """One step for a whole head, of which one channel is large: behind the rotation all channels share its error."""
    keys, values = text(50)
    keys[..., 5] += 200.0
    errors = []
    for rotate in (False, True):
        codec = PerTokenSpec(4, 4, 0, rotate).make(SHAPE, {})
        codec.append(keys, values, Incoming())
        errors.append(float((codec.materialise()[0] - keys)[..., :5].norm() / keys[..., :5].norm()))
    assert errors[1] < 0.7 * errors[0]


def test_sixteen_bits_are_the_cache_itself() -> None:
    keys, values = text()
    for dtype in (torch.float32, torch.bfloat16):
        codec = PerTokenSpec(16, 16, 8).make(SHAPE, {})
        codec.append(keys.to(dtype), values.to(dtype), Incoming())
        assert torch.equal(codec.materialise()[0], keys.to(dtype))
        assert torch.equal(codec.materialise()[1], values.to(dtype))


def test_equal_values_and_large_ones_survive() -> None:
    keys, values = torch.full((1, 2, 3, 16), 7.0), torch.zeros(1, 2, 3, 8)
    values[..., 0] = 3e4
    codec = PerTokenSpec(2, 2, 8).make(SHAPE, {})
    codec.append(keys, values, Incoming())
    assert torch.equal(codec.materialise()[0], keys)
    assert torch.equal(codec.materialise()[1][..., 1:], torch.zeros(1, 2, 3, 7))
    torch.testing.assert_close(codec.materialise()[1][..., 0], values[..., 0], rtol=1e-3, atol=0)


def test_bytes_are_those_of_the_formula() -> None:
    spec = PerTokenSpec(3, 4, 8)
    per_token = 2 * (math.ceil(16 * 3 / 8) + 2 * 4 + math.ceil(8 * 4 / 8) + 1 * 4)
    assert spec.size_bits(1000, SHAPE, 16) == 8 * 1000 * per_token


def test_options_reach_the_codec() -> None:
    method = get("kv-rtn")
    spec = method.spec.codec(4, 8, method.parse({"value_bits": 2, "rotate": True}), False)  # type: ignore[attr-defined]
    assert spec == PerTokenSpec(4, 2, 8, rotate=True)
    with pytest.raises(PlanError, match="value_bits"):
        method.parse({"value_bits": 1})
