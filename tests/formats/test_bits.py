"""Packing against the sentence in docs/native-format.md, written out bit by bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from lilliput.formats.bits import (
    pack_bits,
    pack_unsigned,
    pack_words,
    row_bytes,
    unpack_bits,
    unpack_unsigned,
    unpack_words,
)


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


@pytest.mark.parametrize("bits", [3, 8, 9, 10, 16])
@pytest.mark.parametrize("width", [1, 7, 24])
def test_numbers_of_more_than_a_byte_are_the_documented_bytes(bits: int, width: int) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (4, width), generator=g)
    packed = pack_unsigned(codes, bits)
    assert packed.shape == (4, row_bytes(width, bits))
    assert torch.equal(unpack_unsigned(packed, bits, width), codes)
    for row, held in zip(codes.tolist(), packed.tolist(), strict=True):
        low = min(bits, 8)
        number = sum((code & 255) << (j * low) for j, code in enumerate(row)).to_bytes(row_bytes(width, low), "little")
        if bits > 8:
            more = sum((code >> 8) << (j * (bits - 8)) for j, code in enumerate(row))
            number += more.to_bytes(row_bytes(width, bits - 8), "little")
        assert bytes(held) == number


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 10, 11, 32, 65])
def test_words_are_the_bytes_and_zeros_after_them(bits: int, width: int) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, width), generator=g).to(torch.int8)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-width * bits // 32))
    assert words.dtype == torch.int32
    for row, held in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(held))
        assert number == int.from_bytes(slow(row, bits), "little")
    assert torch.equal(unpack_words(words, bits, width), codes)
    turned = words.T.contiguous().T  # as zero points lie
    assert torch.equal(unpack_words(turned, bits, width), codes)
    one = codes[:1].T.contiguous().T  # a single group: contiguous, and yet with strides of its own
    assert torch.equal(unpack_words(pack_words(one, bits).T.contiguous().T, bits, width), one)
    if bits in (2, 4, 8):  # what no release of the library does otherwise
        assert torch.equal(words, pack_to_int32(codes, bits))
