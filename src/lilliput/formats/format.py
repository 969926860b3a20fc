"""What a numeric grid is to the rest: something that fits, encodes, decodes, and says exactly what it stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from lilliput.errors import PlanError, SourceError
from lilliput.machine.cost import Cost
from lilliput.target import Target

Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix of a stored tensor's name to its dtype and shape
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CHUNK = 1 << 19  # codes widened at a time; a code passes through a 64-bit word


class Grid(Protocol):
    """The fitted parameters of a format for one matrix: scales, zero points, tables."""

    def rows(self, start: int, stop: int) -> Self:
        """The parameters of output rows [start, stop)."""
        ...


@dataclass(frozen=True)
class RangeRule:
    """How a range is chosen: cover it, or search the least sum of importance * |error|^norm among shrunk ranges, in
    `steps` factors; `signed_scale` lets a symmetric scale be negative. See `IntegerFormat.fit`."""

    search: Literal["minmax", "mse"] = "minmax"
    steps: int = 30
    norm: float = 2.0
    signed_scale: bool = False


class Format(Protocol):
    """A numeric grid with its block shape and scale kind; frozen, known before any weight is read.

    Codes are an integer tensor whose first dimension is the output rows, so that rows can be cut; what a code means is
    the format's business. `grid` is what the format's own `fit` returned. What else a format may be able to do is said
    by small protocols: `swept.Sweepable`, `walked.Walked`, `ranged.Ranged`, `ranged.Spaced`.

    holds_zero: whether a weight can be exactly 0 on every grid, of learned tables on those that are told where;
    signed_scales: whether a symmetric scale may be negative.
    """

    holds_zero: ClassVar[bool] = True
    signed_scales: ClassVar[bool] = False

    def describe(self) -> str:
        """For tables: "int4 g64 asym"."""
        ...

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size of a [rows, width] matrix: codes and all parameters, without padding to bytes."""
        ...

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> Grid:
        """Parameters for `weight` [out, in]; `importance` [in] or [out, in] weighs squared errors."""
        ...

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> Any:
        """As `fit`, with ranges chosen as `how` says; a format without ranges is fitted in its own way. Outside
        `support`, bool [out, in], the weight is 0, and stays 0 where the format holds that."""
        return self.fit(weight, importance=importance)

    def encode(self, weight: Tensor, grid: Any) -> Tensor:
        """The nearest codes."""
        ...

    def decode(self, codes: Tensor, grid: Any) -> Tensor:
        """The values of codes, float32 [out, in]."""
        ...

    def stored(self, rows: int, width: int) -> Stored:
        """What a file holds of a [rows, width] matrix: "" is the payload, one-dimensional, others append to it."""
        ...

    def pack(self, codes: Tensor, grid: Any) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        ...

    def unpack(self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int) -> tuple[Tensor, Any]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        ...

    def plain(self) -> dict[str, Any]:
        """The entry of config.json, with the format's `kind`; `formats.known.from_plain` reads it back."""
        ...

    def check(self, rows: int, width: int) -> None:
        """Raises PlanError where a [rows, width] matrix cannot have the format."""
        del rows, width  # any shape will do

    def cost(self, rows: int, width: int) -> Cost:
        """What a [rows, width] matrix takes beyond copies of its weights, and beyond matrix products."""
        return Cost()

    def remark(self) -> str | None:
        """What a reader of a plan would not expect of the format on this machine."""
        return None


def _as_it_is(target: Target) -> Target:
    return target


@dataclass(frozen=True)
class Family:
    """What a file of formats has, for `known.FAMILIES`.

    wanted: the name in a target's `format` to what makes the format of the target, or raises PlanError; written: the
    kind in config.json to what reads it; completed: the target, as a user has written it, with what its format's name
    alone says (bits, group size, kind of scales), or PlanError where it says otherwise; zero_points: whether a target
    may be asymmetric; swept: whether the formats are `swept.Sweepable`.
    """

    wanted: Mapping[str, Callable[[Target], Format]]
    written: Mapping[str, Callable[[Mapping[str, Any]], Format]]
    completed: Callable[[Target], Target] = _as_it_is
    zero_points: bool = False
    swept: bool = False


def fixed_bits(target: Target, bits: str) -> Target:
    """For `Family.completed`: a format whose bits nobody chooses."""
    if target.bits is not None:
        raise PlanError(f"'{target.format}' always has {bits} bits a weight: leave out bits")
    return target


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Undo `dtype_name`, for floats that scales and values are stored in. Raises SourceError for another name."""
    if name not in DTYPES:
        raise SourceError(f"values of type {name!r} are newer than this lilliput: install the version that wrote them")
    return DTYPES[name]
