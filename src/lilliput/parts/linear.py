"""The native layout: what a `quant_method: "lilliput"` folder stores for each linear, and how it is read.

A linear is the sum of its parts between optional transforms. Part 0 stores its payload under the linear's stock name
`weight`, part i under `weight_i`; further tensors append a suffix. Payloads are one-dimensional, so that software which
does not know the layout finds a foreign shape and stops. docs/native-format.md describes every byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.formats.format import Stored
from lilliput.parts import scheme, transform
from lilliput.parts.part import below
from lilliput.parts.scheme import Scheme

VERSION = 2  # 1 knew no transforms
TABLES = 3  # the version of a folder whose embedding or head is compressed
BEHAVES = 4  # the version of a folder with behaviours, which an older reader would leave out
ROUNDS = 5  # the version of a folder with rounded inputs
CACHES = 6  # the version of a folder with compressed caches, which an older reader would leave plain
READS = (1, 2, 3, 4, 5, 6)
ALIGNED = 8  # rows after which the bits of any codes end with a byte


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a native folder. `name` is canonical, `stored` the name in the files, both without ".weight".

    kind: "linear", or "embedding" for a table of tokens; also: other modules that use the same tensors (a tied head).
    """

    name: str
    stored: str
    out_features: int
    in_features: int
    scheme: Scheme
    transposed: bool = False
    kind: str = "linear"
    also: tuple[str, ...] = ()

    @property
    def payload(self) -> str:
        """Name of the first part's payload, which the names of all other tensors extend."""
        return f"{self.stored}.weight"

    def describe(self) -> Stored:
        """Every stored tensor: name to dtype and shape."""
        tensors = self.scheme.stored(self.out_features, self.in_features)
        return {self.payload + suffix: x for suffix, x in tensors.items()}


def decode(spec: LinearSpec, get: Callable[[str], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in] in `dtype`: parts are summed in float32, turned back, and rounded once.

    `get` returns a stored tensor by its name. One part without transforms is decoded a few rows at a time.
    """
    parts_of, rows, width = spec.scheme, spec.out_features, spec.in_features
    transformed = bool(parts_of.inputs or parts_of.outputs)
    # Rows of one part pass through float32 one chunk at a time; the sum with a zero is exact.
    wide = torch.float32 if transformed or len(parts_of.parts) > 1 else dtype
    out = torch.zeros(rows, width, dtype=wide, device=get(spec.payload).device)
    for i, part in enumerate(parts_of.parts):
        part.add_to(out, below(get, spec.payload + scheme.prefix(i)))
    if transformed:
        stored = below(get, spec.payload)
        inputs = transform.load("in", parts_of.inputs, width, stored)
        outputs = transform.load("out", parts_of.outputs, rows, stored)
        out = transform.turn_back(out, inputs, outputs)
    return out.to(dtype).contiguous()


def divides(form: Scheme, rows: int, width: int) -> bool:
    """Whether the stored tensors of a [rows, width] linear are those of its first rows followed by those of the rest,
    wherever it is cut after a multiple of `ALIGNED` rows."""
    if form.inputs or form.outputs:
        return False
    whole = form.stored(rows, width)
    for at in (ALIGNED, 2 * ALIGNED, 3 * ALIGNED):
        if at >= rows:
            continue
        first, rest = form.stored(at, width), form.stored(rows - at, width)
        for suffix, (_, shape) in whole.items():
            a, b = first[suffix][1], rest[suffix][1]
            if a[0] + b[0] != shape[0] or a[1:] != shape[1:] or b[1:] != shape[1:]:
                return False
    return True


def decode_rows(
    spec: LinearSpec, read: Callable[[str, tuple[int, int]], Tensor], start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows [start, stop) of the dense weight, [rows, in] in `dtype`, of a linear whose scheme `divides`.

    `read(name, (first, last))` returns that stretch of a stored tensor along its first axis; no more of it is read.
    """
    first = start - start % ALIGNED
    last = min(spec.out_features, stop + -stop % ALIGNED)
    before = replace(spec, out_features=first).describe() if first else {}
    part = replace(spec, out_features=last - first)
    stored = part.describe()

    @functools.cache  # a payload is asked for its device as well
    def get(name: str) -> Tensor:
        begin = before[name][1][0] if first else 0
        return read(name, (begin, begin + stored[name][1][0]))

    return decode(part, get, dtype)[start - first : stop - first]


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


def plain_config(
    linears: Mapping[str, LinearSpec],
    behaviours: Sequence[Mapping[str, Any]] = (),
    caches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The `quantization_config` entry: schemes once, which linear follows which, what the model leaves out while it
    runs, and how it stores keys and values."""
    schemes: list[dict[str, Any]] = []
    entries: dict[str, Any] = {}
    for stored, spec in linears.items():
        plain = spec.scheme.plain()
        if plain not in schemes:
            schemes.append(plain)
        entry: dict[str, Any] = {"scheme": schemes.index(plain), "shape": [spec.out_features, spec.in_features]}
        if spec.transposed:
            entry["transposed"] = True
        if spec.name != stored:
            entry["name"] = spec.name
        if spec.kind != "linear":
            entry["kind"] = spec.kind
        if spec.also:
            entry["also"] = list(spec.also)
        entries[stored] = entry
    version = TABLES if any(spec.kind != "linear" or spec.also for spec in linears.values()) else VERSION
    if behaviours:
        version = BEHAVES
    if any(spec.scheme.activation is not None for spec in linears.values()):
        version = ROUNDS
    plain = {"quant_method": "lilliput", "version": version, "schemes": schemes, "linears": entries}
    if behaviours:
        plain["behaviours"] = [dict(x) for x in behaviours]
    if caches:
        plain |= {"version": CACHES, "caches": [dict(x) for x in caches]}
    return plain


def parse_config(entry: Mapping[str, Any]) -> dict[str, LinearSpec]:
    """Stored linear name to its description. Raises SourceError for a version or part that this code does not know."""
    if entry.get("version") not in READS:
        raise SourceError(
            f"the folder's native layout has version {entry.get('version')!r}, and this lilliput reads "
            f"{READS}: install the version that wrote it"
        )
    try:
        schemes = [scheme.from_plain(x) for x in entry["schemes"]]
        return {
            stored: LinearSpec(
                name=x.get("name", stored),
                stored=stored,
                out_features=int(x["shape"][0]),
                in_features=int(x["shape"][1]),
                transposed=bool(x.get("transposed", False)),
                scheme=schemes[x["scheme"]],
                kind=str(x.get("kind", "linear")),
                also=tuple(x.get("also", ())),
            )
            for stored, x in entry["linears"].items()
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SourceError(f"quantization_config of the native layout is damaged: {error!r}") from None
