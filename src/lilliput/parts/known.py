"""All kinds of parts, from what config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.formats import known as formats
from lilliput.parts import bitmask, columns, dense, pattern, sparse, tiles
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.rows import RowsSpec


def from_plain(plain: Mapping[str, Any]) -> PartSpec:
    """The part that config.json describes. Raises SourceError for a kind that this code does not know."""
    match plain["kind"]:
        case "dense":
            return dense.from_plain(plain)
        case "sparse":
            return sparse.from_plain(plain)
        case "bitmask":
            return bitmask.from_plain(plain)
        case "tiles":
            return tiles.from_plain(plain)
        case "columns":
            return columns.from_plain(plain)
        case "low-rank":
            return LowRankSpec(int(plain["rank"]), from_plain(plain["left"]), from_plain(plain["right"]))
        case "pattern":
            return pattern.from_plain(plain, from_plain(plain["values"]))
        case "rows":
            return RowsSpec(int(plain["count"]), from_plain(plain["part"]))
        case _:
            return QuantizedSpec(formats.from_plain(plain))
