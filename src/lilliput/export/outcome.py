"""Outcome: what a linear becomes in the written folder, known from shapes alone before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lilliput.export import layouts
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import FloatScales
from lilliput.parts.scheme import Scheme


@dataclass(frozen=True)
class Outcome:
    """What one linear becomes.

    `name` is the canonical name and `stored` the name in the files, both without ".weight"; `scheme` its parts and
    transforms, none where the linear stays dense; `dtype` that of the dense tensor it was or stays. `sparsity` and
    `pattern` tell of zeros in it, `kept` how many weights are none (None: not known before they are chosen),
    `places` ("bits", "tiles") how a layout that leaves the zeros out may say where they are.
    `transposed`: the file holds [in, out] (Conv1D). `expert`: one of many experts; `router`: it decides what each token
    takes of them. `table`: an embedding or a head; `embedding`: it is read row by row; `also`: other modules that use
    the same tensor (a tied head). `stack`: the first of the linears that it is compressed with as one, sharing what
    there is one of for a matrix; "" where nothing is known of that.
    """

    name: str
    stored: str
    out_features: int
    in_features: int
    scheme: Scheme
    dtype: torch.dtype
    sparsity: float | None = None
    pattern: str | None = None
    kept: int | None = None
    places: str = "bits"
    transposed: bool = False
    expert: bool = False
    router: bool = False
    table: bool = False
    embedding: bool = False
    also: tuple[str, ...] = ()
    stack: str = ""

    @property
    def format(self) -> IntegerFormat | None:
        """The integer grid of a linear that is nothing else, and whose inputs stay as they are."""
        return self.scheme.integer

    @property
    def codes(self) -> IntegerFormat | LevelFormat | None:
        """The grid of weights that are nothing else, integers or the small floats of an engine's own layout, whatever
        happens to the inputs."""
        form = self.scheme.weights.grid
        held = isinstance(form, IntegerFormat | LevelFormat) and layouts.of(form, False) is not None
        return form if held else None  # type: ignore[return-value]

    @property
    def layout(self) -> str | None:
        """The layout of compressed-tensors that holds it; None where it stays dense there."""
        return None if self.codes is None else layouts.of(self.codes, self.scheme.activation is not None)

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Of scales that are plain floats; None where there are no others."""
        form = self.codes
        if isinstance(form, LevelFormat):
            return form.scales.dtype if isinstance(form.scales, FloatScales) else None
        return None if form is None else form.scale_dtype

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the dense tensor as the file holds it."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    @property
    def ragged(self) -> bool:
        """Whether the last group is shorter than the others."""
        form = self.codes
        return form is not None and form.group_size > 0 and self.in_features % form.group_size != 0


def largest_group(outcomes: Iterable[Outcome]) -> int | None:
    """The largest of 128, 64, 32 that divides every quantized linear's inputs; None where none does."""
    width = math.gcd(*(x.in_features for x in outcomes if x.codes is not None))
    return next((g for g in (128, 64, 32) if width % g == 0), None)
