"""Vector codebooks: one entry number for several weights that lie below each other in a column.

Vectors run down the outputs, not along the inputs: outputs do not interact in tr(D G DT), so a method that goes through
the inputs one by one can round each of them to its nearest vectors without giving up any feedback between inputs.

"e8": the 65,536 points of E8P (`algebra.e8`), 2 bits a weight, nothing stored but entry numbers and scales.
"vector": 2^(bits * dimension) learned entries, found by weighted k-means on the matrix itself (GPTVQ, arXiv
2402.15319) and stored in float16, as vectors of weights divided by their scales.

The code of a weight is entry * dimension + its place within the vector, so rows can be cut anywhere. Where the
dimension does not divide the outputs, the last vectors have places that nothing reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.algebra import compiled, e8, ldlq
from lilliput.algebra.ranges import stored as stored_scale
from lilliput.errors import LilliputError, PlanError
from lilliput.formats.bits import pack_unsigned, row_bytes, unpack_unsigned
from lilliput.formats.format import Family, Format, Stored, dtype_name, dtype_of
from lilliput.formats.integer import group_of, scale_dtype_of
from lilliput.machine.cost import Cost
from lilliput.target import Target

_CHUNK = 1 << 12  # vectors compared with a codebook at a time
_SAMPLE = 1 << 15  # vectors that k-means looks at
_PASSES = 25


@dataclass(frozen=True)
class VectorGrid:
    """`scale` [out, 1] in the format's scale dtype ([1, 1]: one for all); `table` float16 [entries, dimension], None
    where the format's definition fixes it."""

    scale: Tensor
    table: Tensor | None = None

    def rows(self, start: int, stop: int) -> VectorGrid:
        """The grid of output rows [start, stop); one scale serves all rows."""
        return self if self.scale.shape == (1, 1) else replace(self, scale=self.scale[start:stop])


def rms_scale(weight: Tensor, per_row: bool, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` times the root mean square of each row, or of the matrix, as `dtype` holds it: [out, 1] or [1, 1].

    A unit of zeros gets scale 1. Raises LilliputError for NaN or infinity, and above the range of `dtype`.
    """
    square = weight.float().square()
    mean = square.mean(1, keepdim=True) if per_row else square.mean().reshape(1, 1)
    scale = stored_scale(mean.sqrt() * factor, dtype).to(dtype)
    if bool(torch.isfinite(scale).all()):
        return scale
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LilliputError(f"the weight contains {bad} values that are NaN or infinite: it cannot be quantized")
    raise LilliputError(
        f"a scale exceeds the range of {dtype_name(dtype)}: set scale_dtype to float32 (or bfloat16) for this layer"
    )


def checked(scale_dtype: torch.dtype) -> None:
    """Raises PlanError for a scale dtype that no format has."""
    if scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise PlanError(f"scales in {scale_dtype}: choose float16, bfloat16 or float32")


def unit_of(target: Target, name: str) -> tuple[bool, torch.dtype]:
    """Whether a resolved target wants a scale for each row, and the scales' type. Raises PlanError for groups
    and another kind of scales."""
    size = group_of(target)
    if size > 0:
        raise PlanError(
            f"the format '{name}' has one scale per row or per tensor, not per {size} inputs: "
            "set group_size to channel or tensor"
        )
    return size == -1, scale_dtype_of(target)


def each_row(grid: VectorGrid, rows: int) -> Tensor:
    """The scale of each of `rows` rows, float32 [rows]."""
    return grid.scale.float().flatten().expand(rows)


def by_column(form: Format, grid: VectorGrid) -> ldlq.Settle:
    """A sweep's columns rounded one by one, by the format's own `encode` and `decode`."""

    def nearest(column: Tensor) -> tuple[Tensor, Tensor]:
        codes = form.encode(column[:, None], grid)
        return codes[:, 0], form.decode(codes, grid)[:, 0]

    return ldlq.by_column(nearest)


@dataclass(frozen=True)
class VectorFormat(Format):
    """See the module. `entry_bits`: bits of an entry number; `learned`: the table is stored, else it is E8P's.

    Raises PlanError for tables of less than 4 or more than 256 learned entries.
    """

    holds_zero: ClassVar[bool] = False

    dimension: int
    entry_bits: int
    learned: bool
    per_row: bool
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        checked(self.scale_dtype)
        if self.learned and not 2 <= self.entry_bits <= 8:
            raise PlanError(f"a learned codebook of 2^{self.entry_bits} entries: choose 2^2 to 2^8")

    def describe(self) -> str:
        name = f"vector{self.dimension} of {1 << self.entry_bits}" if self.learned else "e8p"
        return f"{name} {'row' if self.per_row else 'tensor'}"

    def cost(self, rows: int, width: int) -> Cost:
        """What encoding works in whatever the shape."""
        return Cost(ram=compiled.MEMORY if compiled.available() and not self.learned else 0)

    def check(self, rows: int, width: int) -> None:
        """Raises PlanError where a [rows, width] matrix has fewer vectors than a learned table has entries."""
        vectors = self.vectors(rows) * width
        if self.learned and 1 << self.entry_bits > vectors:
            raise PlanError(
                f"a table of {1 << self.entry_bits} entries for {vectors} vectors of a [{rows}, {width}] "
                "linear: a codebook must be smaller than its data; choose fewer bits, or exclude this layer"
            )

    def vectors(self, rows: int) -> int:
        """Vectors in a column of `rows` weights."""
        return -(-rows // self.dimension)

    def size_bits(self, rows: int, width: int) -> int:
        scales = (rows if self.per_row else 1) * self.scale_dtype.itemsize * 8
        table = 16 * (self.dimension << self.entry_bits) if self.learned else 0
        return self.vectors(rows) * width * self.entry_bits + scales + table

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, seed: int = 0) -> VectorGrid:
        """Scales from root mean squares; learned entries by k-means, vectors weighted by their column's mean
        `importance`. Raises LilliputError for NaN or infinity in either."""
        factor = 1.0 if self.learned else 1.0 / e8.SPREAD
        grid = VectorGrid(rms_scale(weight, self.per_row, factor, self.scale_dtype))
        if not self.learned:
            return grid
        weights = torch.ones(weight.shape[1], device=weight.device)
        if importance is not None:
            weights = (importance if importance.dim() == 1 else importance.mean(0)).to(weight).float()
            if not bool(torch.isfinite(weights.sum())):
                raise LilliputError("the importance of the inputs contains NaN or infinity: check the calibration data")
        vectors = self._split(weight.float() / grid.scale.float())
        each = weights.repeat(self.vectors(len(weight)))
        return replace(grid, table=_kmeans(vectors, each, 1 << self.entry_bits, seed).half())

    def encode(self, weight: Tensor, grid: VectorGrid) -> Tensor:
        """Codes of the nearest entries, int32 [out, in]; scales of rows within a vector are not weighed."""
        rows, width = weight.shape
        vectors = self._split(weight.float() / grid.scale.float())
        entry = torch.empty(len(vectors), dtype=torch.int64, device=weight.device)
        for a in range(0, len(vectors), _CHUNK):
            part = vectors[a : a + _CHUNK]
            entry[a : a + _CHUNK] = _nearest(part, grid.table.float()) if grid.table is not None else e8.nearest(part)
        return self._codes(entry.view(-1, width), rows)

    def decode(self, codes: Tensor, grid: VectorGrid) -> Tensor:
        table = e8.table().to(codes.device) if grid.table is None else grid.table.float()
        return table.view(-1)[codes.long()] * grid.scale.float()

    def settle(self, grid: VectorGrid, rows: int) -> ldlq.Settle:
        """How a sweep rounds columns of `rows` weights."""
        if self.learned or grid.scale.device.type != "cpu" or not compiled.available():
            return by_column(self, grid)
        return functools.partial(compiled.settle_e8, e8.patterns(), e8.table(), each_row(grid, rows))

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kinds "e8" and "vector"."""
        count = self.vectors(rows) * row_bytes(width, self.entry_bits)
        tensors: Stored = {
            "": (torch.uint8, (count,)),
            "_scale": (self.scale_dtype, (rows if self.per_row else 1, 1)),
        }
        if self.learned:
            tensors["_table"] = (torch.float16, (1 << self.entry_bits, self.dimension))
        return tensors

    def pack(self, codes: Tensor, grid: VectorGrid) -> dict[str, Tensor]:
        entry = codes[:: self.dimension] // self.dimension
        tensors = {"": _pack(entry, self.entry_bits), "_scale": grid.scale.to(self.scale_dtype).contiguous()}
        return tensors if grid.table is None else tensors | {"_table": grid.table.contiguous()}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, VectorGrid]:
        first, last = start // self.dimension, self.vectors(stop)
        packed = get("").view(self.vectors(rows), -1)[first:last]
        codes = self._codes(_unpack(packed, self.entry_bits, width), (last - first) * self.dimension)
        a = start - first * self.dimension
        grid = VectorGrid(get("_scale"), get("_table") if self.learned else None)
        return codes[a : a + stop - start], grid.rows(start, stop)

    def plain(self) -> dict[str, Any]:
        shared = {"per_row": self.per_row, "scale_dtype": dtype_name(self.scale_dtype)}
        if not self.learned:
            return {"kind": "e8", **shared}
        return {"kind": "vector", "dimension": self.dimension, "entry_bits": self.entry_bits, **shared}

    def _split(self, values: Tensor) -> Tensor:
        """[out, in] to vectors [vectors * in, dimension], missing places 0."""
        rows, width = values.shape
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % self.dimension))
        return padded.view(-1, self.dimension, width).transpose(1, 2).reshape(-1, self.dimension)

    def _codes(self, entry: Tensor, rows: int) -> Tensor:
        place = torch.arange(self.dimension, device=entry.device)[:, None]
        return (entry[:, None] * self.dimension + place).flatten(0, 1)[:rows].to(torch.int32)


def _nearest(vectors: Tensor, table: Tensor) -> Tensor:
    return torch.addmm(table.square().sum(1), vectors, table.T, alpha=-2).argmin(1)


def _kmeans(vectors: Tensor, weights: Tensor, count: int, seed: int) -> Tensor:
    """Centres [count, d] of least weighted squared distance, from vectors chosen evenly along their first direction."""
    generator = torch.Generator().manual_seed(seed)
    weights = weights.clamp(min=0) + 1e-9 * weights.max().clamp(min=1e-30)
    if len(vectors) > _SAMPLE:
        chosen = torch.randperm(len(vectors), generator=generator)[:_SAMPLE].to(vectors.device)
        vectors, weights = vectors[chosen], weights[chosen]
    start = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    centres = vectors[start.repeat(-(-count // len(start)))[:count]].clone()
    for _ in range(_PASSES):
        own = _nearest(vectors, centres)
        mass = torch.zeros(count, device=vectors.device).index_add_(0, own, weights)
        total = torch.zeros_like(centres).index_add_(0, own, vectors * weights[:, None])
        centres = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-30)[:, None], centres)
    return centres


def _pack(entry: Tensor, bits: int) -> Tensor:
    """Entry numbers [n, in] to bytes, each row from a new byte."""
    if bits == 16:
        return torch.stack((entry & 0xFF, entry >> 8), -1).to(torch.uint8).flatten()
    return pack_unsigned(entry, bits).flatten()


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    if bits == 16:
        pair = packed.view(len(packed), width, 2).long()
        return pair[..., 0] | pair[..., 1] << 8
    return unpack_unsigned(packed, bits, width)


def e8_from_plain(plain: Mapping[str, Any]) -> VectorFormat:
    """Undo `VectorFormat.plain` for kind "e8"."""
    return VectorFormat(e8.DIMENSION, 16, False, plain["per_row"], dtype_of(plain["scale_dtype"]))


def from_plain(plain: Mapping[str, Any]) -> VectorFormat:
    """Undo `VectorFormat.plain` for kind "vector"."""
    dtype = dtype_of(plain["scale_dtype"])
    return VectorFormat(plain["dimension"], plain["entry_bits"], True, plain["per_row"], dtype)


def e8_from_target(target: Target) -> VectorFormat:
    """E8P for a resolved target. Raises PlanError for other than 2 bits and for groups of inputs."""
    if target.bits not in (None, 2):
        raise PlanError(f"the format 'e8' has 2 bits a weight, not {target.bits}: set bits to 2, or format to trellis")
    return VectorFormat(e8.DIMENSION, 16, False, *unit_of(target, "e8"))


def from_target(target: Target) -> VectorFormat:
    """A learned codebook for a resolved target: vectors of 4 weights at 2 bits, of 2 at 3 and 4 bits.

    Raises PlanError for other bits and for groups of inputs.
    """
    if target.bits is None or target.bits > 4:
        raise PlanError(f"the format 'vector' has 2 to 4 bits a weight, not {target.bits}: set bits to one of those")
    dimension = 4 if target.bits == 2 else 2
    return VectorFormat(dimension, target.bits * dimension, True, *unit_of(target, "vector"))


def completed(target: Target) -> Target:
    """See `Family`."""
    return target.model_copy(update={"bits": 2}) if target.format == "e8" and target.bits is None else target


FAMILY = Family(
    wanted={"e8": e8_from_target, "vector": from_target},
    written={"e8": e8_from_plain, "vector": from_plain},
    completed=completed,
)
