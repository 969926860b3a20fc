"""Codes of b bits in bytes: eight codes fill b bytes, least significant bits first, each row from a new byte."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 4  # bytes


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes."""
    return -(-width * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [rows, width] to uint8 [rows, row_bytes]: code + 2^(bits-1), eight to a little-endian word."""
    rows, width = codes.shape
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    if bits == 8:
        return unsigned.to(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -width % 8)).view(rows, -1, 8)
    words = (padded << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    shifts = torch.arange(bits, device=codes.device) * 8
    parts = (words.unsqueeze(-1) >> shifts) & 0xFF
    return parts.to(torch.uint8).view(rows, -1)[:, : row_bytes(width, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_bits`: uint8 [rows, row_bytes] to int8 [rows, width]."""
    rows = packed.shape[0]
    device = packed.device
    if bits == 8:
        return (packed ^ 0x80).view(torch.int8)
    if bits in (2, 4):  # codes that never cross a byte need no wide words
        per = 8 // bits
        shifts = torch.arange(per, dtype=torch.uint8, device=device) * bits
        values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return (values.view(rows, -1)[:, :width].to(torch.int8) - (1 << (bits - 1))).contiguous()
    groups = -(-width // 8)
    full = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[1])).view(rows, groups, bits)
    words = (full.to(torch.int64) << (torch.arange(bits, device=device) * 8)).sum(-1)
    values = (words.unsqueeze(-1) >> (torch.arange(8, device=device) * bits)) & ((1 << bits) - 1)
    return (values.view(rows, -1)[:, :width] - (1 << (bits - 1))).to(torch.int8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """`pack_bits` in 32-bit words, as compressed-tensors holds codes from 0.19 on: int32 [rows, ceil(width bits / 32)].

    Its own function packed 3, 5, 6 and 7 bits otherwise before, so that a file would depend on what is installed.
    """
    packed = pack_bits(codes, bits)
    return _plain(torch.nn.functional.pad(packed, (0, -packed.shape[1] % WORD))).view(torch.int32)


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_words`: int32 [rows, words] to int8 [rows, width]."""
    return unpack_bits(_plain(words).view(torch.uint8)[:, : row_bytes(width, bits)], bits, width)


def _plain(rows: Tensor) -> Tensor:
    """Row after row in memory and by its strides, which `contiguous` leaves as they are along axes of one entry."""
    return rows.clone(memory_format=torch.contiguous_format)


def pack_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Numbers [rows, width] below 2^bits, up to 16 bits, to uint8 [rows, row_bytes]. Of more than 8 bits the low bytes
    of a row come first, then the bits above them, packed likewise."""
    if bits <= 8:
        return pack_bits(codes - (1 << (bits - 1)), bits)
    return torch.cat(((codes & 0xFF).to(torch.uint8), pack_unsigned(codes >> 8, bits - 8)), 1)


def unpack_unsigned(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_unsigned`: uint8 [rows, row_bytes] to int64 [rows, width]."""
    if bits <= 8:
        return unpack_bits(packed, bits, width).long() + (1 << (bits - 1))
    return packed[:, :width].long() | unpack_unsigned(packed[:, width:], bits - 8, width) << 8
