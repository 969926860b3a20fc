"""The native layout: what a `quant_method: "lilliput"` folder stores for each linear, and how it is read.

A linear is the sum of its parts. Part 0 stores its payload under the linear's stock name `weight`, part i under
`weight_i`; further tensors append `_scale`, `_zero`. Payloads are one-dimensional, so that software which does not
know the layout finds a foreign shape and stops. docs/native-format.md describes every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.formats.integer import Grid, IntegerFormat
from lilliput.runtime.bits import pack_bits, row_bytes, unpack_bits

VERSION = 1
CHUNK = 1 << 19  # codes widened at a time; a code passes through a 64-bit word
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class DenseSpec:
    """Plain values in `dtype`, row-major."""

    dtype: torch.dtype

    def describe(self, prefix: str, rows: int, width: int) -> Described:
        return {prefix: (self.dtype, (rows * width,))}

    def plain(self) -> dict[str, Any]:
        return {"kind": "dense", "dtype": _dtype_name(self.dtype)}

    def decode(self, get: Callable[[str], Tensor], prefix: str, rows: int, width: int, out: Tensor) -> None:
        out += get(prefix).view(rows, width)


@dataclass(frozen=True)
class IntegerSpec:
    """Integer codes on a grid, packed at their own width."""

    format: IntegerFormat

    def groups(self, width: int) -> int:
        size = self.format.group_size
        return 1 if size <= 0 else -(-width // size)

    def describe(self, prefix: str, rows: int, width: int) -> Described:
        grid = (1, 1) if self.format.group_size == 0 else (rows, self.groups(width))
        tensors: Described = {
            prefix: (torch.uint8, (rows * row_bytes(width, self.format.bits),)),
            f"{prefix}_scale": (self.format.scale_dtype, grid),
        }
        if not self.format.symmetric:
            tensors[f"{prefix}_zero"] = (torch.uint8, (row_bytes(grid[0] * grid[1], self.format.bits),))
        return tensors

    def plain(self) -> dict[str, Any]:
        f = self.format
        return {
            "kind": "int",
            "bits": f.bits,
            "symmetric": f.symmetric,
            "group_size": f.group_size,
            "scale_dtype": _dtype_name(f.scale_dtype),
        }

    def encode(self, prefix: str, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        rows, width = codes.shape
        bits = self.format.bits
        packed = torch.empty(rows, row_bytes(width, bits), dtype=torch.uint8)
        step = max(1, CHUNK // width)
        for a in range(0, rows, step):
            packed[a : a + step] = pack_bits(codes[a : a + step], bits)
        tensors = {prefix: packed.view(-1), f"{prefix}_scale": grid.scale.to(self.format.scale_dtype).contiguous()}
        if grid.zero is not None:
            tensors[f"{prefix}_zero"] = pack_bits(grid.zero.reshape(1, -1), bits).view(-1)
        return tensors

    def decode(self, get: Callable[[str], Tensor], prefix: str, rows: int, width: int, out: Tensor) -> None:
        bits = self.format.bits
        packed = get(prefix).view(rows, -1)
        scale = get(f"{prefix}_scale")
        zero = None
        if not self.format.symmetric:
            zero = unpack_bits(get(f"{prefix}_zero").view(1, -1), bits, scale.numel()).view(scale.shape)
        grid = Grid(scale, zero)
        step = max(1, CHUNK // width)
        for a in range(0, rows, step):
            b = min(rows, a + step)
            some = grid if self.format.group_size == 0 else grid.rows(a, b)
            out[a:b] += self.format.decode(unpack_bits(packed[a:b], bits, width), some)


PartSpec = DenseSpec | IntegerSpec


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a native folder. `name` is canonical, `stored` the name in the files, both without ".weight"."""

    name: str
    stored: str
    out_features: int
    in_features: int
    parts: tuple[PartSpec, ...]
    transposed: bool = False

    def describe(self) -> Described:
        """Every stored tensor: name to dtype and shape."""
        tensors: Described = {}
        for i, part in enumerate(self.parts):
            tensors |= part.describe(part_prefix(self.stored, i), self.out_features, self.in_features)
        return tensors


def part_prefix(stored: str, index: int) -> str:
    """Name of a part's payload tensor."""
    return f"{stored}.weight" if index == 0 else f"{stored}.weight_{index}"


def decode(spec: LinearSpec, get: Callable[[str], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in] in `dtype`: parts are summed in float32 and rounded once.

    `get` returns a stored tensor by its name. One integer part is decoded a few rows at a time.
    """
    first = get(part_prefix(spec.stored, 0))
    shape = (spec.out_features, spec.in_features)
    if len(spec.parts) == 1 and dtype != torch.float32:
        # rows pass through float32 one chunk at a time; the sum with a zero is exact
        out = torch.zeros(shape, dtype=dtype, device=first.device)
    else:
        out = torch.zeros(shape, dtype=torch.float32, device=first.device)
    for i, part in enumerate(spec.parts):
        part.decode(get, part_prefix(spec.stored, i), spec.out_features, spec.in_features, out)
    return out.to(dtype)


def read_linear(tensors: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:
    """The dense float32 weight of a linear as an uncompressed file would hold it: [out, in], or [in, out] transposed.

    `tensors`: stored name to tensor, at least those that `spec.describe()` names. Raises SourceError where one is
    missing or has another shape or dtype.
    """
    for name, (dtype, shape) in spec.describe().items():
        if name not in tensors:
            raise SourceError(f"tensor '{name}' is missing; the folder is incomplete: write or download it again")
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            raise SourceError(
                f"tensor '{name}' is {tensors[name].dtype} {tuple(tensors[name].shape)}, config.json describes "
                f"{dtype} {shape}: the files do not belong together"
            )
    weight = decode(spec, tensors.__getitem__)
    return weight.T.contiguous() if spec.transposed else weight


def plain_config(linears: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """The `quantization_config` entry: schemes once, and which linear follows which."""
    schemes: list[dict[str, Any]] = []
    entries: dict[str, Any] = {}
    for stored, spec in linears.items():
        scheme = {"parts": [part.plain() for part in spec.parts]}
        if scheme not in schemes:
            schemes.append(scheme)
        entry: dict[str, Any] = {"scheme": schemes.index(scheme), "shape": [spec.out_features, spec.in_features]}
        if spec.transposed:
            entry["transposed"] = True
        if spec.name != stored:
            entry["name"] = spec.name
        entries[stored] = entry
    return {"quant_method": "lilliput", "version": VERSION, "schemes": schemes, "linears": entries}


def parse_config(entry: Mapping[str, Any]) -> dict[str, LinearSpec]:
    """Stored linear name to its description. Raises SourceError for a version or part that this code does not know."""
    if entry.get("version") != VERSION:
        raise SourceError(
            f"the folder's native layout has version {entry.get('version')!r}, this lilliput reads {VERSION}: "
            "install the lilliput that wrote it"
        )
    try:
        schemes = [tuple(_part(p) for p in scheme["parts"]) for scheme in entry["schemes"]]
        return {
            stored: LinearSpec(
                name=x.get("name", stored),
                stored=stored,
                out_features=int(x["shape"][0]),
                in_features=int(x["shape"][1]),
                parts=schemes[x["scheme"]],
                transposed=bool(x.get("transposed", False)),
            )
            for stored, x in entry["linears"].items()
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SourceError(f"quantization_config of the native layout is damaged: {error!r}") from None


def _part(plain: Mapping[str, Any]) -> PartSpec:
    if plain["kind"] == "int":
        scale = DTYPES[plain["scale_dtype"]]
        return IntegerSpec(IntegerFormat(plain["bits"], plain["symmetric"], plain["group_size"], scale))
    if plain["kind"] == "dense":
        return DenseSpec(DTYPES[plain["dtype"]])
    raise SourceError(f"a part of kind {plain['kind']!r} is newer than this lilliput: install the one that wrote it")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
