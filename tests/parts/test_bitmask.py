"""Kept weights and a bit for every weight, against lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.parts import bitmask
from lilliput.parts.bitmask import BitmaskPart, BitmaskSpec


def _matrix(rows: int, width: int, share: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * width)
    return torch.randn(rows, width, generator=g), torch.rand(rows, width, generator=g) < share


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 8), (5, 21), (7, 64), (2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_bit_and_value_is_where_the_format_says(rows: int, width: int, share: float, dtype: torch.dtype) -> None:
    weight, mask = _matrix(rows, width, share)
    part = bitmask.gather(weight, mask, dtype)
    packed = part.pack()
    expected, values = [[0] * -(-width // 8) for _ in range(rows)], []
    for i in range(rows):
        for j in range(width):
            if mask[i, j]:
                expected[i][j // 8] |= 1 << j % 8
                values.append(float(weight[i, j].to(dtype)))
    assert packed["_mask"].dtype == torch.uint8
    assert packed["_mask"].tolist() == expected
    assert packed[""].tolist() == values
    assert torch.equal(part.decode(), (weight * mask).to(dtype).float())
    assert torch.equal(bitmask.unpack(packed["_mask"], width), mask)
    assert part.spec == BitmaskSpec(len(values), dtype)
    assert part.bits() == part.spec.size_bits(rows, width) == len(values) * 8 * dtype.itemsize + rows * width


@pytest.mark.parametrize("chunk", [1, 50, 1 << 19])
def test_values_are_added_to_what_is_there(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "CHUNK", chunk)
    weight, mask = _matrix(9, 21, 0.4)
    part = bitmask.gather(weight, mask, torch.float32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = torch.ones(9, 21, dtype=dtype)
        part.spec.add_to(out, part.pack().__getitem__)
        assert torch.equal(out, 1 + (weight * mask).to(dtype))


def test_kept_zeros_stay_kept() -> None:
    part = bitmask.gather(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool))
    assert part.spec.count == 10
    assert isinstance(part.rows(1, 2), BitmaskPart)
    assert part.rows(1, 2).spec.count == 5
