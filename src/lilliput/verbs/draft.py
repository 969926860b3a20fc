"""What the steps so far make of a linear, as far as shapes say it, and the rules for a step that adds to that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from lilliput.errors import PlanError
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import ScaleSpec
from lilliput.target import Target


@dataclass(frozen=True)
class Draft:
    """`dtype`: of the plain tensor that the linear was; `quantized`: whether a step has put codes on a grid;
    `sparsity`: share of zeros (None: none are made, or a later part fills them); `kept`: how many weights are left
    (None: not known); `places`: how it is stored where they are."""

    dtype: torch.dtype
    scheme: Scheme = field(default_factory=Scheme)
    quantized: bool = False
    sparsity: float | None = None
    pattern: str | None = None
    kept: int | None = None
    places: str = "bits"


@runtime_checkable
class Particular(Protocol):
    """A format that not every matrix can have."""

    def check(self, rows: int, width: int) -> None:
        """Raises PlanError for a [rows, width] matrix that cannot have it."""
        ...


def checked(scheme: Scheme, rows: int, width: int) -> Scheme:
    """The scheme. Raises PlanError where one of its formats cannot be on a [rows, width] matrix."""
    for part in scheme.parts:
        if isinstance(part, QuantizedSpec) and isinstance(part.format, Particular):
            part.format.check(rows, width)
    return scheme


def pruned(label: str, draft: Draft, target: Target, width: int, kept: int | None) -> Draft:
    """The linear when a step chooses its zeros and keeps `kept` weights (None: not known). Raises PlanError after parts
    or other zeros, and for a pattern that does not divide the width."""
    if draft.scheme.parts:
        raise PlanError(f"{label}: pruning after quantization would tear holes into fitted codes: prune first")
    if draft.scheme.inputs or draft.scheme.outputs:
        raise PlanError(
            f"{label}: an earlier step transforms this layer, and a mask does not survive that: leave one out"
        )
    if draft.sparsity is not None:
        raise PlanError(f"{label}: an earlier step prunes this layer already; keep one of them")
    sparsity = target.sparsity
    if target.pattern is not None:
        n, _, m = target.pattern.partition(":")
        if width % int(m):
            raise PlanError(
                f"{label}: the pattern {target.pattern} does not divide the width {width}: "
                "exclude this layer or use unstructured sparsity"
            )
        sparsity = 1 - int(n) / int(m)
    return replace(draft, sparsity=sparsity, pattern=target.pattern, kept=kept, places=target.places)


def opened(draft: Draft, first: PartSpec | None) -> Draft:
    """The linear when a step fills its zeros: what it keeps is the part `first`, where it has no parts yet."""
    scheme = draft.scheme if first is None else replace(draft.scheme, parts=(first,))
    return replace(draft, scheme=scheme, sparsity=None, pattern=None, kept=None)


def refined(label: str, draft: Draft) -> Draft:
    """The linear when a step changes the zeros or the values that an earlier step has chosen. Raises PlanError where
    none has, or codes are fitted to them already."""
    if draft.scheme.parts:
        raise PlanError(
            f"{label}: it changes zeros and values that an earlier step has already fitted codes to: put it before "
            "that step"
        )
    if draft.sparsity is None:
        raise PlanError(
            f"{label}: it refines what a pruning step has chosen, and no step before it prunes this layer: put one "
            "first, such as wanda or sparsegpt"
        )
    return draft


def once(label: str, draft: Draft) -> None:
    """Raises PlanError where the linear has codes already."""
    if draft.quantized:
        raise PlanError(f"{label}: an earlier step quantizes this layer already; keep one of them")


def check_statistics(label: str, draft: Draft, needs: Collection[str], fisher: bool) -> None:
    """Raises PlanError where the step reads what does not survive the transforms of the linear so far."""
    scheme = draft.scheme
    rotated = any(not isinstance(x, ScaleSpec) for x in scheme.inputs)
    missing: str | None = None
    if fisher and (scheme.inputs or scheme.outputs):
        missing = "squared gradients"
    elif rotated and {"absmean", "absmax", "low", "high", "extremes", "histogram"} & set(needs):
        missing = "extremes, means or counts of single inputs"
    if missing is not None:
        raise PlanError(
            f"{label}: it reads {missing}, which are not known for a layer that an earlier step has rotated "
            f"({scheme.describe()}): choose another option, or leave one of the two steps out"
        )


def unmasked(label: str, draft: Draft, masked: bool) -> None:
    """Raises PlanError where a step that keeps no zeros (`masked` false) comes after one that makes some."""
    if draft.sparsity is not None and not masked:
        raise PlanError(f"{label}: it would fill the zeros that an earlier step made: leave one of the two out")


def extended(label: str, draft: Draft, added: Scheme, quantizes: bool) -> Draft:
    """The linear with what a step adds. Raises PlanError where that undoes what earlier steps have decided."""
    scheme = draft.scheme
    if (added.inputs or added.outputs) and (scheme.parts or draft.sparsity is not None):
        raise PlanError(
            f"{label}: it transforms the weight, and an earlier step has already decided its parts or zeros: "
            "move it to the front"
        )
    if draft.sparsity is not None and added.fills:
        raise PlanError(
            f"{label}: {added.describe()} reaches every weight, so an earlier step's zeros would not stay: "
            "leave one of the two steps out"
        )
    whole = Scheme(
        (*scheme.parts, *added.parts),
        (*scheme.inputs, *added.inputs),
        (*scheme.outputs, *added.outputs),
        scheme.activation,
    )
    return replace(draft, scheme=whole, quantized=draft.quantized or quantizes)
