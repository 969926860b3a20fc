"""Packing against the sentence in docs/native-format.md, written out bit by bit."""

from __future__ import annotations

import pytest
import torch

from lilliput.formats.bits import pack_bits, row_bytes, unpack_bits


def slow(row: list[int], bits: int) -> bytes:
    number = sum((code + (1 << (bits - 1))) << (j * bits) for j, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 7, 8, 9, 33])
def test_bytes_are_the_documented_ones(bits: int, width: int) -> None:
    rng = torch.Generator().manual_seed(width)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (5, width), generator=rng).to(torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, row_bytes(width, bits))
    assert [bytes(row.tolist()) for row in packed] == [slow(row.tolist(), bits) for row in codes]
    back = unpack_bits(packed, bits, width)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)
