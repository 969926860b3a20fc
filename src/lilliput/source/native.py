"""Weights of a folder in Lilliput's own format, as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.parts.linear import LinearSpec, decode_rows, divides, parse_config
from lilliput.parts.linear import decode as decode_linear
from lilliput.source.packed import Packed
from lilliput.source.reader import Reader


@dataclass(frozen=True)
class Native:
    """One linear that the runtime decodes: parts summed in float32 and rounded once to `dtype`."""

    spec: LinearSpec
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.spec.out_features, self.spec.in_features)
        return shape[::-1] if self.spec.transposed else shape

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.spec.describe())

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight as an uncompressed file would hold it, or its rows [start, stop)."""
        spec = self.spec
        if rows is not None and not spec.transposed and divides(spec.scheme, spec.out_features, spec.in_features):
            return decode_rows(spec, reader.read, *rows, self.dtype)
        weight = decode_linear(self.spec, reader.read, self.dtype)
        weight = weight.T.contiguous() if self.spec.transposed else weight
        return weight if rows is None else weight[rows[0] : rows[1]].clone()


def find(reader: Reader, config: Mapping[str, Any], dtype: torch.dtype, label: str) -> dict[str, Packed]:
    """Logical weight name -> how to decode it. Raises SourceError: a part is missing, or of another shape or dtype."""
    packed: dict[str, Packed] = {}
    for stored, spec in parse_config(config).items():
        for name, (kind, shape) in spec.describe().items():
            entry = reader.entries.get(name)
            if entry is None or entry.shape != shape or entry.dtype != kind:
                actual = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                raise SourceError(
                    f"{label}: tensor {name} is {actual}, and config.json describes {kind} {list(shape)}. The files do "
                    "not belong together: write or download the folder again."
                )
        packed[f"{stored}.weight"] = Native(spec, dtype)
    return packed
