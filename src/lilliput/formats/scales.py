"""Kinds of scales: how a file holds one positive number for each group of weights.

`name` is what a recipe's `scale_dtype` says:

    float16, bfloat16, float32   plain
    e8m0      a power of two, exponent + 127 in a byte (OCP Microscaling)
    e4m3      an 8-bit float, divided by one float32 for each matrix (NVFP4)
    int8/N    8-bit integers after subtracting their mean, one float32 for each N scales of the matrix (double
              quantization of QLoRA, arXiv 2305.14314; N = 256 there)
    intB/row  B-bit integers times one float32 for each output row (VS-Quant, arXiv 2102.04503)
    intB/N    B-bit integers, with a float16 step and offset for each N consecutive groups of a row (SpQR, arXiv
              2306.03078; B = 3, N = 16 there)

A kind keeps integer `codes` of groups and a tuple of tensors, `second`, that several groups share; neighbouring codes
are neighbouring values, so a search moves them by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lilliput.algebra.ranges import stored as rounded
from lilliput.errors import PlanError, SourceError
from lilliput.formats.format import DTYPES, Stored, dtype_name
from lilliput.formats.shared_scales import AffineScales, BlockScales, Get, RowScales, Second, filled

EXAMPLES = ("float16", "bfloat16", "float32", "e8m0", "e4m3", "int8/256", "int4/row", "int3/16")


class ScaleKind(Protocol):
    """A kind of scales; frozen. `peak` [rows, groups] is scale * top, with `top` the largest level of the grid."""

    @property
    def name(self) -> str:
        """As in a recipe."""
        ...

    @property
    def shared(self) -> Literal["nothing", "row", "matrix"]:
        """Between which groups `second` is shared."""
        ...

    def second(self, peak: Tensor, top: float) -> Second:
        """What groups share, for these peaks."""
        ...

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        """Codes [rows, groups] of peaks."""
        ...

    def values(self, codes: Tensor, second: Second) -> Tensor:
        """Scales, float32 [rows, groups]."""
        ...

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        """Codes moved by so many, inside their range."""
        ...

    def rows(self, second: Second, start: int, stop: int) -> Second:
        """What rows [start, stop) share."""
        ...

    def size_bits(self, rows: int, groups: int) -> int:
        """Exact size."""
        ...

    def stored(self, rows: int, groups: int) -> Stored:
        """Tensors in the file by suffix, without the word in front ("_scale")."""
        ...

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        ...

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        """Codes of rows [start, stop), and what those share."""
        ...


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix: codes [rows, groups] and what groups share."""

    kind: ScaleKind
    codes: Tensor
    second: Second = ()

    def values(self) -> Tensor:
        """float32 [rows, groups]."""
        return self.kind.values(self.codes, self.second)

    def rows(self, start: int, stop: int) -> Scales:
        """Those of output rows [start, stop); one for the matrix serves all. Raises ValueError where blocks of scales
        reach over rows."""
        if self.codes.shape == (1, 1):
            return self
        return replace(self, codes=self.codes[start:stop], second=self.kind.rows(self.second, start, stop))


@dataclass(frozen=True)
class FloatScales:
    """One float a group; the codes are the scales."""

    dtype: torch.dtype
    shared: Literal["nothing"] = "nothing"

    @property
    def name(self) -> str:
        return dtype_name(self.dtype)

    def second(self, peak: Tensor, top: float) -> Second:
        return ()

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        return rounded(peak / top, self.dtype).to(self.dtype)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        return codes.float()

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return codes

    def rows(self, second: Second, start: int, stop: int) -> Second:
        return ()

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * self.dtype.itemsize * 8

    def stored(self, rows: int, groups: int) -> Stored:
        return {"": (self.dtype, (rows, groups))}

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        return {"": codes.contiguous()}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        return get("")[start:stop], ()


@dataclass(frozen=True)
class PowerScales:
    """2^(code - 127). A block's exponent is floor(log2 of its largest value) less that of the largest level."""

    name: str = "e8m0"
    shared: Literal["nothing"] = "nothing"

    def second(self, peak: Tensor, top: float) -> Second:
        return ()

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        largest = torch.frexp(torch.tensor(top)).exponent.to(peak.device)
        code = torch.frexp(peak).exponent - largest + 127
        return torch.where(peak > 0, code, 127).clamp_(1, 254).to(torch.int16)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        return torch.where(codes == 0, 2.0**-127, (codes.to(torch.int32) << 23).view(torch.float32))

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return (codes + by).clamp_(1, 254)

    def rows(self, second: Second, start: int, stop: int) -> Second:
        return ()

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * 8

    def stored(self, rows: int, groups: int) -> Stored:
        return {"": (torch.uint8, (rows, groups))}

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        return {"": codes.to(torch.uint8).contiguous()}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        return get("")[start:stop].to(torch.int16), ()


@dataclass(frozen=True)
class SmallFloatScales:
    """e4m3 divided by a float32 that takes the matrix's largest scale to 448; the codes are the bit patterns."""

    name: str = "e4m3"
    shared: Literal["matrix"] = "matrix"

    def second(self, peak: Tensor, top: float) -> Second:
        largest = peak.max() if peak.numel() else peak.new_tensor(0.0)
        factor = torch.where(largest > 0, 448.0 * top / largest, 1.0)
        return (factor.clamp(max=2.0**120).reshape(1),)

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        small = (filled(peak) / top * second[0]).clamp_(max=448.0).to(torch.float8_e4m3fn)
        return small.view(torch.uint8).to(torch.int16).clamp_(1, 126)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() / second[0]

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return (codes + by).clamp_(1, 126)

    def rows(self, second: Second, start: int, stop: int) -> Second:
        return second

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * 8 + 32

    def stored(self, rows: int, groups: int) -> Stored:
        return {"": (torch.uint8, (rows, groups)), "_divisor": (torch.float32, (1,))}

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        return {"": codes.to(torch.uint8).contiguous(), "_divisor": second[0].clone()}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        return get("")[start:stop].to(torch.int16), (get("_divisor"),)


def unpack(kind: ScaleKind, get: Get, units: tuple[int, int], start: int, stop: int, word: str = "_scale") -> Scales:
    """The scales of rows [start, stop), of `units` in all, from tensors whose suffixes begin with `word`."""
    if units == (1, 1):
        start, stop = 0, 1
    return Scales(kind, *kind.unpack(lambda suffix: get(word + suffix), *units, start, stop))


def parse(name: str) -> ScaleKind:
    """The kind that a recipe's `scale_dtype` names; "auto" is float16. Raises PlanError, with the nearest."""
    if name in DTYPES or name == "auto":
        return FloatScales(DTYPES.get(name, torch.float16))
    if name in ("e8m0", "e4m3"):
        return PowerScales() if name == "e8m0" else SmallFloatScales()
    match = re.fullmatch(r"int([0-9]+)/(row|[0-9]+)", name)
    if match is None:
        from lilliput.errors import nearest  # recipes check their scale_dtype here

        raise PlanError(f"no kind of scales is called '{name}'.{nearest(name, EXAMPLES)}")
    bits, over = int(match[1]), match[2]
    if not 2 <= bits <= 8:
        near = f"int{min(8, max(2, bits))}/{over}"
        raise PlanError(f"scales of {bits} bits ('{name}'): integers have 2 to 8 bits; the nearest is {near}")
    if over == "row":
        return RowScales(bits)
    if not 2 <= int(over) <= 65536:
        near = f"int{bits}/{min(65536, max(2, int(over)))}"
        raise PlanError(f"blocks of {over} scales ('{name}'): a block has 2 to 65536; the nearest is {near}")
    return BlockScales(int(over)) if bits == 8 else AffineScales(bits, int(over))


def joins_rows(name: str) -> bool:
    """Whether rows share blocks of scales of this kind, so that they cannot be cut apart."""
    return isinstance(parse(name), BlockScales)


def from_plain(name: str) -> ScaleKind:
    """The kind that config.json names. Raises SourceError for one that this code does not know."""
    try:
        return parse(name)
    except PlanError:
        raise SourceError(
            f"scales of kind {name!r} are newer than this lilliput: install the version that wrote them"
        ) from None


def choose(
    kind: ScaleKind, cover: Tensor, ideal: Tensor | None, top: float, error: Callable[[Tensor], Tensor]
) -> Scales:
    """The scales of least error among those that hold neighbours of `cover` or of `ideal`, both peaks [rows, groups].

    `error` takes scales float32 [rows, groups] and says what each group loses, in the same shape. Never worse than the
    codes of `cover`: for each group, or, where groups of a row share what `ideal` changes, for each row.
    """
    best, least = _search(kind, kind.second(cover, top), cover, ideal, top, error)
    if ideal is None or kind.shared != "row":
        return best
    other, loss = _search(kind, kind.second(ideal, top), cover, ideal, top, error)
    better = loss.sum(1, keepdim=True) < least.sum(1, keepdim=True)
    shared = tuple(torch.where(better, a, b) for a, b in zip(other.second, best.second, strict=True))
    return Scales(kind, torch.where(better, other.codes, best.codes), shared)


def search(scales: Scales, error: Callable[[Tensor], Tensor]) -> Scales:
    """The scales with each code moved by up to two where that lowers what its group loses; see `choose`."""
    return _descend(scales, error(scales.values()), error)[0]


def _search(
    kind: ScaleKind,
    second: Second,
    cover: Tensor,
    ideal: Tensor | None,
    top: float,
    error: Callable[[Tensor], Tensor],
) -> tuple[Scales, Tensor]:
    codes = kind.coded(cover, top, second)
    least = error(kind.values(codes, second))
    if ideal is not None:
        codes, least, _ = _take(kind, kind.coded(ideal, top, second), codes, least, second, error)
    return _descend(Scales(kind, codes, second), least, error)


def _descend(scales: Scales, least: Tensor, error: Callable[[Tensor], Tensor]) -> tuple[Scales, Tensor]:
    kind, codes, second = scales.kind, scales.codes, scales.second
    for _ in range(2):
        start, changed = codes, False
        for by in (-1, 1):
            codes, least, some = _take(kind, kind.shifted(start, by), codes, least, second, error)
            changed = changed or some
        if not changed:
            break
    return Scales(kind, codes, second), least


def _take(
    kind: ScaleKind, trial: Tensor, codes: Tensor, least: Tensor, second: Second, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, bool]:
    loss = error(kind.values(trial, second))
    better = loss < least
    return torch.where(better, trial, codes), torch.where(better, loss, least), bool(better.any())
