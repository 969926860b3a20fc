"""What the methods of the family `fit` share: one loss for the whole block, and trained numbers for each linear.

The loss is the mean squared difference between the outputs of the block and those of the uncompressed one, on the same
inputs, as a share of the loss at the start, so that rates and penalties mean the same in every block. With `weigh`
"tokens" each token's error is divided by the mean square of its output: some tokens are a hundred times larger than the
others (attention sinks) and would decide everything, although the next norm brings all tokens to the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import ggml, integer, rounding
from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.ggml_bytes import KINDS
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.rounding import Trainable, Units
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.transform import pull, turn, turn_back
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.training import minimise as train
from lilliput.training.descent import DescentOptions, batches, losses
from lilliput.training.equivalence import Equivalence, Factor
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

_EDGE = 0.5 - 2.0**-10  # how far from its code a position may lie
_CHUNK = 1 << 17  # weights worked on at a time


class FitOptions(DescentOptions):
    """What every method of the family has."""

    start: Literal["mse", "minmax"] = Field(
        "mse", description="grid of a layer that no earlier step quantized: least weighted error, or covering the range"
    )


@dataclass(frozen=True)
class Start:
    """Some rows of a linear before the descent: what to approximate, and codes on a grid that do so already.

    weight float32 [rows, in]: what the other parts leave over between the transforms, 0 outside the support; base:
    those other parts' sum (None: no others); scale, zero float32 [units]; grid: what they come from; codes int8;
    continued: whether they are an earlier step's; factor: what learned scales of channels make of the weight.
    """

    units: Units
    weight: Tensor
    base: Tensor | None
    support: Tensor | None
    scale: Tensor
    zero: Tensor
    grid: Any
    codes: Tensor
    continued: bool
    factor: Factor | None = None

    def present(self) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The weight with its channels scaled as they are now, and how many times as far as at the start each unit
        reaches upwards and downwards; differentiable."""
        if self.factor is None:
            return self.weight, 1.0, 1.0
        now = self.factor.apply(self.weight)
        low, high = self.units.extremes(now)
        first_low, first_high = self.units.extremes(self.weight)
        if self.units.form.symmetric:
            ratio = _ratio(torch.maximum(-low, high), torch.maximum(-first_low, first_high))
            return now, ratio, ratio
        return now, _ratio(high, first_high), _ratio(low, first_low)

    def origin(self, margin: float) -> Tensor:
        """Positions float32 [rows, in] that round to the codes: w / S where it does, else the nearest that does, moved
        towards the code by the share `margin`. Between uneven levels as if they were evenly spaced."""
        centred = self.codes - self.units.spread(self.zero)
        meant, levels = centred, self.units.form.levels(self.codes.device)
        gap = 1.0
        if levels is not None:
            meant = levels[self.codes.long() - self.units.form.lowest]
            gap = float(levels[-1] - levels[0]) / (len(levels) - 1)
        off = (meant - self.weight / self.units.spread(self.scale)).div_(gap)
        return centred - off.clamp_(-_EDGE, _EDGE).mul_(1.0 - margin)

    def clipped(self, upper: Tensor, lower: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale, as stored, and zero point [units] with the ends of the range times factors [units], differentiable;
        lower None: the grid is symmetric, and `upper` a factor on its scale."""
        form, scale, zero = self.units.form, self.scale, self.zero
        if lower is None:
            return rounding.stored(scale * upper, zero, self.units, self.grid)
        low = (form.lowest - zero) * lower
        high = (form.highest - zero) * upper
        wide = scale * ((high - low) / (form.highest - form.lowest))
        at = form.lowest - low * (scale / wide)
        return rounding.stored(wide, at, self.units, self.grid)

    def masked(self, value: Tensor) -> Tensor:
        """`value` with 0 outside the support, plus the other parts."""
        value = value if self.support is None else value * self.support
        return value if self.base is None else value + self.base

    def pieces(self) -> list[Start]:
        """A few rows at a time, so that what a step works in stays in the caches; a grid per tensor stays whole."""
        return [
            Start(
                units,
                self.weight[rows],
                None if self.base is None else self.base[rows],
                None if self.support is None else self.support[rows],
                self.scale[rows],
                self.zero[rows],
                self.grid.rows(rows.start, rows.stop),
                self.codes[rows],
                self.continued,
                None if self.factor is None else self.factor.rows(rows.start, rows.stop),
            )
            for rows, units in self.units.pieces_with_units(_CHUNK)
        ]


class Fitted(Protocol):
    """Rows of a linear under descent: leaves, and the weight that they stand for."""

    @property
    def parameters(self) -> Sequence[train.Parameter]:
        """The leaves."""
        ...

    def weight(self) -> Tensor:
        """The weight [rows, in] for the present leaves, differentiable."""
        ...

    def finish(self) -> tuple[Tensor, Any]:
        """Codes int8 [rows, in], zero points added, and grid for the present leaves, as they would be stored."""
        ...


def _ratio(now: Tensor, first: Tensor) -> Tensor:
    return torch.where(first != 0, now / torch.where(first != 0, first, 1.0), 1.0)


Penalty = Callable[[Fitted, float], Tensor | None]


@dataclass(frozen=True)
class _Linear:
    """A linear under descent: the layer before it, without codes of an earlier step, and its rows."""

    layer: Layer
    form: Trainable
    fitted: Sequence[Fitted]
    factor: Factor | None = None

    def whole(self) -> Tensor:
        """The weight [out, in] for the present leaves, outside its transforms."""
        return turn_back(torch.cat([x.weight() for x in self.fitted]), self.layer.inputs, self.layer.outputs)

    def finished(self) -> Layer:
        """The layer for the present leaves, as it would be stored."""
        codes, grids = zip(*(x.finish() for x in self.fitted), strict=True)
        whole, support = torch.cat(codes), self.layer.support
        grid = _joined(grids)
        if support is not None and self.form.holds_zero:
            rest = Units(self.form, *whole.shape).spread(self.form.opened(grid)[1])
            whole = torch.where(support, whole, rest.to(whole.dtype))
        weight = self.layer.weight if self.factor is None else self.factor.apply(self.layer.weight)
        return replace(self.layer, weight=weight, parts=(*self.layer.parts, QuantizedPart(self.form, whole, grid)))


def _joined(grids: Sequence[Any]) -> Any:
    """The grid of all rows, of those of a few."""
    fields = [[getattr(grid, name) for grid in grids] for name in vars(grids[0])]
    return type(grids[0])(*(None if x[0] is None else torch.cat(x) for x in fields))


def _start(layer: Layer, stats: SiteStats | None, target: Target, o: FitOptions) -> tuple[Layer, Start]:
    has_codes = bool(layer.parts) and isinstance(layer.parts[-1], QuantizedPart)
    before = replace(layer, parts=layer.parts[:-1] if has_codes else layer.parts)
    weight = before.rest()
    base = turn(layer.weight, layer.inputs, layer.outputs) - weight if before.parts else None
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    if has_codes:
        part = layer.parts[-1]
        form = part.format if isinstance(part, QuantizedPart) else None
        if not isinstance(part, QuantizedPart) or not isinstance(form, IntegerFormat | GgmlFormat):
            raise PlanError(f"{layer.name}: only codes of integers or ggml's types can be fitted: leave the step out")
        grid, codes = part.grid, part.codes
    else:
        form = (ggml if target.format in KINDS else integer).from_target(target)
        grid = form.fit(weight, search=o.start, importance=_importance(layer, stats, o))
        codes = form.encode(weight, grid)
    units = Units(form, *weight.shape)
    scale, zero = form.opened(grid)
    return before, Start(units, weight, base, layer.support, scale, zero, grid, codes, has_codes)


def _importance(layer: Layer, stats: SiteStats | None, o: FitOptions) -> Tensor | None:
    """Mean squares of the inputs where they say anything: a rotation has made them alike, and squares of single inputs
    do not survive it."""
    if stats is None or not stats.count or o.start != "mse":
        return None
    seen = stats.through(layer.inputs)
    return None if seen.square is None and seen.gram is None else seen.second_moment().to(layer.weight)


def descend(
    block: FitBlock,
    io: FitIO,
    targets: Mapping[str, Target],
    o: FitOptions,
    begin: Callable[[Start], Fitted],
    schedule: train.Schedule,
    penalty: Penalty | None = None,
    moves: Equivalence | None = None,
) -> BlockFit:
    """Train all linears of a block together, from an earlier step's codes or the nearest ones on a grid of their own;
    the layers of the best state. `moves`: scales and shifts that are trained with them, where `begin` looks at
    `Start.present`.

    Raises PlanError without bits in a target, or where an earlier step used another format than integers.
    """
    linears: dict[str, _Linear] = {}
    for name, layer in block.layers.items():
        before, start = _start(layer, io.stats.get(block.anatomy.linear(name).site), targets[name], o)
        factor = None if moves is None else moves.factor(name)
        pieces = replace(start, factor=factor).pieces()
        linears[name] = _Linear(before, start.units.form, [begin(piece) for piece in pieces], factor)
    order = batches(len(io.inputs), o)

    # A mini-batch is judged by what its own samples lose at the start, so that an easy one is not mistaken for
    # progress.
    scale: list[float] = []

    def whole() -> float:
        with torch.no_grad():
            finished = {name: x.finished().decode() for name, x in linears.items()}
            finished |= {} if moves is None else moves.vectors()
            each = losses(block, io, finished, range(len(io.inputs)), o)
        if not scale:
            scale.extend(each)
        return sum(each) / len(each)

    def slope(step: int) -> float:
        chosen = order[step]
        norm = max(sum(scale[n] for n in chosen), 1e-30)
        with torch.no_grad():
            leaves = {name: x.whole() for name, x in linears.items()}
        with torch.enable_grad():
            vectors = {} if moves is None else moves.vectors()
            leaves |= {name: x.detach() for name, x in vectors.items()}
            for leaf in leaves.values():
                leaf.requires_grad_()
            total = sum(losses(block, io, leaves, chosen, o, backward=norm))
        if vectors:
            slopes = [leaves.pop(name).grad for name in vectors]
            torch.autograd.backward(list(vectors.values()), slopes)
        del vectors
        for name, linear in linears.items():
            gradient = leaves.pop(name).grad
            if gradient is not None:
                gradient = pull(gradient, linear.layer.inputs, linear.layer.outputs)
            at = 0
            for x in linear.fitted:
                with torch.enable_grad():
                    if gradient is not None:
                        weight = x.weight()
                        weight.backward(gradient[at : at + len(weight)])  # type: ignore[no-untyped-call]
                        at += len(weight)
                    extra = None if penalty is None else penalty(x, step / schedule.steps)
                    if extra is not None:
                        extra.backward()  # type: ignore[no-untyped-call]
        return total / norm

    parameters = [p for linear in linears.values() for x in linear.fitted for p in x.parameters]
    parameters += [] if moves is None else moves.parameters
    descent = train.minimise(parameters, slope, whole, schedule)
    with torch.no_grad():
        layers = {name: x.finished() for name, x in linears.items()}
    return BlockFit(layers, descent.start, descent.end, () if moves is None else moves.folds())
