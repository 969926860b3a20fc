"""What a roofline predicts, as data: how a model is served, its operators, and a row for each device and phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lilliput.efficiency.serving import Serving
from lilliput.efficiency.shapes import Matrix, Shapes

Phase = Literal["prefill", "decode"]
Bound = Literal["arithmetic", "memory", "overhead"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Operator:
    """All operators of one kind in one pass: operations, bytes moved, seconds, and which of the two takes longer; what
    comes on top of all operators has neither and is bound by "overhead"."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: Bound

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Workload:
    """One model as an engine holds it: shapes, how each matrix is served, the dtype of everything else, the bytes of
    all weights in memory."""

    shapes: Shapes
    served: Mapping[str, Serving]
    dtype: torch.dtype
    memory: int

    def groups(self) -> Mapping[tuple[Matrix, Serving], int]:
        """Equal matrices served equally, and how often they occur."""
        return Counter(
            (Matrix(x.role, x.role, 0, x.out_features, x.in_features, x.active, x.copies), self.served[x.tensor])
            for x in self.shapes.matrices
        )


@dataclass(frozen=True)
class Row:
    """One prediction, the base's beside it where there is one. Seconds are of one prefill of batch x context tokens, or
    of one decoding step of batch tokens; bound: what most of the time goes to; fits: whether weights and cache find
    room in the device's memory."""

    device: str
    batch: int
    context: int
    phase: Phase
    seconds: float
    bound: str
    fits: bool
    operators: tuple[Operator, ...]
    sentence: str
    base_seconds: float | None = None
    base_bound: str | None = None
    base_fits: bool | None = None
    base_operators: tuple[Operator, ...] = ()
    speedup: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: a row of the report's "roofline"."""
        out: dict[str, Any] = dict(vars(self))
        out["operators"] = [x.to_json() for x in self.operators]
        out["base_operators"] = [x.to_json() for x in self.base_operators]
        return out
