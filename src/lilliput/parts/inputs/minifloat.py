"""Inputs as small floats with a shared scale: x = value * scale, `value` of a table such as e4m3 or e2m1.

Three kinds of scales. Plain: max|x| / top, float32, found while the model runs or stored. e8m0: the power of two by the
rule of the Microscaling specification, floor(log2 max|x|) less the exponent of the table's largest value (`even`: the
exponent of max|x| once it is rounded to the table's own mantissa, or for e4m3, which has no 1.875 at the top, to one
bit). e4m3: one 8-bit float for each group, of global * max|x| / top, with a stored global = 448 top / max|x| over
the calibration text; the scale is that number divided by global. What rounds to 0 becomes 1/8. Those are the
definitions of compressed-tensors, so that engines compute the same.

What lies above the largest value is cut to it. Infinities are not: an infinite input makes its group NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import tables
from lilliput.formats.format import Stored
from lilliput.formats.scales import PowerScales
from lilliput.parts.inputs import units
from lilliput.parts.inputs.units import Granularity
from lilliput.parts.part import Get

Kind = Literal["float32", "e8m0", "e8m0-even", "e4m3"]
SCALE, GLOBAL = "_scale", "_global"
_TOP = 448.0  # of e4m3
_LEAST = 0.125  # what a scale that rounds to 0 becomes


@dataclass(frozen=True)
class FloatInput:
    """table: a name of `tables.FLOATS`; granularity and group_size as in `UniformInput`; clip: share of a dynamic range
    that is covered. Raises PlanError for what cannot be."""

    table: str
    granularity: Granularity = "token"
    group_size: int = 0
    scales: Kind = "float32"
    dynamic: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        units.check(self.granularity, self.group_size, self.dynamic)
        if self.scales != "float32" and not self.dynamic:
            raise PlanError(f"{self.scales} scales of inputs are found while the model runs: leave out dynamic: false")

    @property
    def bits(self) -> float:
        return tables.FLOATS[self.table].bits

    def describe(self) -> str:
        kind = "" if self.scales == "float32" else f" {self.scales} scales"
        unit = units.describe(self.granularity, self.group_size)
        return f"{self.table} {unit}{kind}{'' if self.dynamic else ' static'}"

    @property
    def alike(self) -> bool:
        return self.granularity in ("token", "tensor")

    def stored(self, width: int) -> Stored:
        count = units.count(self.granularity, self.group_size, width)
        if self.scales == "e4m3":
            return {GLOBAL: (torch.float32, (1,))}
        return {} if self.dynamic else {SCALE: (torch.float32, (count,))}

    def round(self, x: Tensor, get: Get) -> Tensor:
        table = tables.of(self.table, int(self.bits), (), str(x.device))
        seen = x.reshape(*x.shape[:-1], -1, self.group_size) if self.granularity == "group" else x
        if self.dynamic:
            scale = self._found(seen, table.top, get)
        else:
            scale = get(SCALE)[:, None] if self.granularity == "group" else get(SCALE)
        values = seen / scale
        table.snap(values)
        return values.mul_(scale).reshape(x.shape)

    def _found(self, x: Tensor, top: float, get: Get) -> Tensor:
        low, high = units.extremes(x, self.granularity)
        peak = torch.maximum(-low, high).mul_(self.clip)
        scale = self.scale(peak, top, None if self.scales != "e4m3" else get(GLOBAL))
        return torch.where(torch.isfinite(peak), scale, torch.nan)

    def scale(self, peak: Tensor, top: float, whole: Tensor | None = None) -> Tensor:
        """The scales float32 for largest inputs `peak` of any shape; `whole`: the stored global one."""
        if whole is not None:
            own = (whole * (peak / top)).clamp(max=_TOP).to(torch.float8_e4m3fn).float()
            return torch.where(own == 0, _LEAST, own) / whole
        if self.scales == "float32":
            scale = peak / top
            return torch.where(scale > 0, scale, torch.ones_like(scale))
        if self.scales == "e8m0-even":
            # Half a step of the table's mantissa added to the bits carries over where the mantissa would round up.
            mantissa = 1 if self.table == "e4m3" else tables.FLOATS[self.table].mantissa
            half = 1 << (22 - mantissa)
            peak = (peak.contiguous().view(torch.int32) + half).view(torch.float32) * (peak > 0)
        kind = PowerScales()
        return kind.values(kind.coded(peak, top, ()), ())

    def plain(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"kind": "float", "table": self.table, "granularity": self.granularity}
        entry |= {"scales": self.scales, "dynamic": self.dynamic}
        if self.group_size:
            entry["group_size"] = self.group_size
        if self.clip != 1.0:
            entry["clip"] = self.clip
        return entry


def whole(largest: Tensor, top: float) -> Tensor:
    """The global scale [1] for inputs up to `largest`: with it the largest scale of a group is the largest e4m3."""
    found = _TOP * top / largest.float().reshape(1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(torch.isfinite(found), found, 1.0)


def from_plain(plain: Mapping[str, Any]) -> FloatInput:
    """Undo `FloatInput.plain`."""
    return FloatInput(
        str(plain["table"]),
        plain["granularity"],
        int(plain.get("group_size", 0)),
        plain["scales"],
        bool(plain["dynamic"]),
        float(plain.get("clip", 1.0)),
    )
