"""Exporters: one file per layout. Each says early what it cannot hold, describes exact shapes, and packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from lilliput.errors import PlanError, nearest
from lilliput.export.outcome import Outcome
from lilliput.parts.layer import Layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Name = Literal["compressed-tensors", "lilliput"]


class Exporter(Protocol):
    """One layout. Stateless: everything follows from the outcomes and the model's config."""

    @property
    def name(self) -> str: ...

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        """Why this layout cannot hold the outcomes, and the nearest that loads; None where it can."""
        ...

    def describe(self, outcome: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Stored tensor name to dtype and shape, exactly as `pack` makes them."""
        ...

    def pack(self, outcome: Outcome, layer: Layer) -> dict[str, Tensor]:
        """The described tensors, filled from the layer's parts. ValueError: the layer does not match the outcome."""
        ...

    def pack_rows(self, outcome: Outcome, layer: Layer, start: int) -> dict[str, Tensor]:
        """What `pack` makes of a table, piece by piece: the next rows of each tensor, from the layer of the rows from
        `start` on; what tells of the whole table comes with the first. ValueError as `pack`."""
        ...

    def config(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> dict[str, Any] | None:
        """The entry `quantization_config` of config.json; None where every linear stays dense."""
        ...

    def dense_note(self, outcomes: Sequence[Outcome]) -> str | None:
        """Plain sentences: where an engine will run the file dense, or reads it only to a tolerance."""
        ...


def get(name: str) -> Exporter:
    """The exporter `name`. Raises PlanError with the nearest name."""
    return _forms(name)[0]


def _forms(name: str) -> tuple[Exporter, ...]:
    """The layout `name` in the forms that an engine may need it in, best first; they differ in config.json alone."""
    from lilliput.export.compressed_tensors import CompressedTensors
    from lilliput.export.native import Native

    forms: dict[str, tuple[Exporter, ...]] = {
        "compressed-tensors": (CompressedTensors(), CompressedTensors(decoded=True)),
        "lilliput": (Native(),),
    }
    if name not in forms:
        raise PlanError(f"unknown export layout '{name}'.{nearest(name, forms)}")
    return forms[name]


def choose(
    outcomes: Sequence[Outcome],
    config: PretrainedConfig,
    wanted: str = "auto",
    refuse: Callable[[Exporter], str | None] = lambda _: None,
) -> Exporter:
    """The layout to write: an engine's own where it holds the outcomes, else the native one.

    `refuse` says what else stands against a layout. Raises PlanError, with the nearest that loads, when `wanted` names
    a layout that cannot hold the outcomes, or none can.
    """
    reasons: list[str] = []
    for name in ("compressed-tensors", "lilliput") if wanted == "auto" else (wanted,):
        obstacles: list[str] = []
        for exporter in _forms(name):
            reason = exporter.refuse(outcomes, config) or refuse(exporter)
            if reason is None:
                return exporter
            obstacles.append(reason)
        if wanted != "auto":
            raise PlanError(f"the layout '{wanted}' cannot hold this result: {obstacles[0]}")
        reasons.append(f"{name}: {obstacles[0]}")
    raise PlanError("no layout can hold this result. " + " ".join(reasons))
