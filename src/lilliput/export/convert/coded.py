"""Linears of a finished folder as codes and their grids, whichever of the two layouts the folder has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import skeleton
from lilliput.errors import PlanError
from lilliput.export.outcome import Outcome
from lilliput.formats.bits import unpack_words
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DenseSpec
from lilliput.parts.pattern import PatternSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme, quantized
from lilliput.parts.tiles import TilesSpec
from lilliput.source.layers import integer_format
from lilliput.source.packed import Scaled
from lilliput.source.source import Source


@dataclass(frozen=True)
class Coded:
    """A linear of a folder whose first part is codes: value = (code - zero) * scale."""

    outcome: Outcome
    form: IntegerFormat
    source: Source

    @property
    def rows(self) -> int:
        return self.outcome.out_features

    @property
    def width(self) -> int:
        return self.outcome.in_features

    @property
    def groups(self) -> int:
        """Groups in a row; none is shorter where the container has room for the linear."""
        return 1 if self.form.group_size <= 0 else self.width // self.form.group_size

    def codes(self) -> Tensor:
        """int8 [out, in], signed: -2^(bits - 1) and up."""
        scaled = self._scaled
        if scaled is not None:
            words = self.source.part(scaled.codes)
            return unpack_words(words, self.form.bits, self.width)
        return self.form.unpack(self._get, self.rows, self.width, 0, self.rows)[0]

    def grid(self, group: int = 0) -> tuple[Tensor, Tensor | None]:
        """Scale [out, groups] as stored, and zero int8 of that shape, in signed code units; None: all 0. A grid per
        tensor is told for each row, and one of larger groups for each `group` inputs."""
        scaled = self._scaled
        if scaled is None:
            grid = self.form.unpack_grid(self._get)
            scale, zero = grid.scale, grid.zero
        else:
            scale, zero = self.source.part(scaled.scale), None
            scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
            if scaled.zero is not None:
                zero = self.source.part(scaled.zero)
                if scaled.zero_packed:
                    zero = unpack_words(zero.T, self.form.bits, self.rows).T
                zero = zero.reshape(-1, scale.shape[1])
        each = self.width // group // scale.shape[1] if group > 0 else 1

        def spread(x: Tensor) -> Tensor:
            return x.expand(self.rows, -1).repeat_interleave(each, 1)

        return spread(scale), None if zero is None else spread(zero)

    def order(self) -> Tensor | None:
        """The group of each input, int32 [in], where inputs do not share by position."""
        scaled = self._scaled
        return None if scaled is None or scaled.order is None else self.source.part(scaled.order).to(torch.int32)

    @property
    def _scaled(self) -> Scaled | None:
        packed = self.source.packing(f"{self.outcome.stored}.weight")
        return packed if isinstance(packed, Scaled) else None

    def _get(self, suffix: str) -> Tensor:
        return self.source.part(f"{self.outcome.stored}.weight{suffix}")


def linears(source: Source, outcomes: Iterable[Outcome]) -> tuple[Coded, ...]:
    """Those of the outcomes whose first part is codes."""
    return tuple(Coded(x, form, source) for x in outcomes if (form := first_form(x.scheme)) is not None)


def halves(linears: Iterable[Coded], kinds: Sequence[torch.dtype], container: str) -> torch.dtype:
    """The first of these types that holds all scales as they are. Raises PlanError where none does."""
    left = list(kinds)
    for x in linears:
        scale = x.grid()[0].float()
        fits = [kind for kind in left if bool((scale.to(kind).float() == scale).all())]
        if not fits:
            names = " and no ".join(str(kind).removeprefix("torch.") for kind in left)
            raise PlanError(
                f"'{x.outcome.name}' has scales that {container} does not hold: no {names} is equal to them. Nearest: "
                "compress again with target.scale_dtype float16"
            )
        left = fits
    return left[0]


def in_place(coded: Iterable[Coded], container: str) -> None:
    """Raises PlanError for a linear whose inputs do not share scales by position."""
    for x in coded:
        if x.order() is not None:
            raise PlanError(
                f"'{x.outcome.name}' has groups of inputs that do not lie side by side, and {container} has no place "
                "for their order. Nearest: gptq"
            )


def plain(scheme: Scheme) -> bool:
    """Whether a linear is plain values, which a folder may hold by their places."""
    if scheme.inputs or scheme.outputs or len(scheme.parts) > 1 or scheme.activation is not None:
        return False
    return all(
        isinstance(x.values if isinstance(x, PatternSpec) else x, DenseSpec | BitmaskSpec | TilesSpec)
        for x in scheme.parts
    )


def first_form(scheme: Scheme) -> IntegerFormat | None:
    """The grid of the first part, where that is integers with plain scales; `Scheme.integer` is of linears that are
    nothing else."""
    part = scheme.parts[0] if scheme.parts else None
    form = part.format if isinstance(part, QuantizedSpec) else None
    return form if isinstance(form, IntegerFormat) else None


def outcomes(source: Source) -> tuple[Outcome, ...]:
    """The linears of a folder that are stored in another form than a plain tensor, and all experts.

    Raises PlanError for weights in a form that no converter takes.
    """
    head = _head(source)
    found = []
    for name, stored in source.stored.items():
        base = name.removesuffix(".weight")
        expert = re.search(r"\.experts\.\d+\.", base) is not None
        packed, spec = source.packing(name), source.linear(name)
        if spec is not None:
            table = spec.kind == "embedding" or bool(spec.also) or spec.name == head
            found.append(
                Outcome(
                    spec.name,
                    spec.stored,
                    spec.out_features,
                    spec.in_features,
                    spec.scheme,
                    stored.dtype,
                    transposed=spec.transposed,
                    expert=expert,
                    table=table,
                    embedding=spec.kind == "embedding",
                    also=spec.also,
                )
            )
        elif packed is None:
            if expert and len(stored.shape) == 2:
                rows, width = stored.shape
                found.append(Outcome(base, base, rows, width, Scheme(), stored.dtype, expert=True))
        elif isinstance(packed, Scaled) and packed.bits is not None:
            scheme, (rows, width) = quantized(integer_format(source, packed)), stored.shape
            table = base == head
            found.append(Outcome(base, base, rows, width, scheme, stored.dtype, expert=expert, table=table))
        else:
            raise PlanError(
                f"tensor {name} is held as '{source.quantization}' holds it, and codes are read from folders of the "
                "layouts lilliput and compressed-tensors (pack-quantized): give one of these"
            )
    return tuple(found)


def _head(source: Source) -> str | None:
    """The module name of the head."""
    model = skeleton(source.config)
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)
