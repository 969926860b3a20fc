"""What the methods of the family `fit` share: one loss of the whole block, each linear with trained numbers of its own.

The loss is the mean squared difference between the outputs of the block and those of the uncompressed one, on the same
inputs, as a share of what the start loses; so rates and penalties mean the same in every block. With `weigh` "tokens"
each token's error is divided by the mean square of its output: some tokens are a hundred times larger than the others
(attention sinks), and would decide everything although the next norm brings them down to the size of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from lilliput import train
from lilliput.algebra.rounding import Units
from lilliput.errors import PlanError
from lilliput.formats.integer import Grid, IntegerFormat, from_target
from lilliput.methods.view import BlockFit, FitBlock, FitIO
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.recipe import Strict, Target
from lilliput.stats.site import SiteStats

_EDGE = 0.5 - 2.0**-10  # how far from its code a position may lie


class FitOptions(Strict):
    """What every method of the family has; the plan reads `iters` and `batch` to foresee the time."""

    iters: int = Field(200, ge=0, description="steps of descent; 0 returns the start")
    lr: float | None = Field(None, gt=0.0, description="length of the first step; none: the method's own choice")
    batch: int = Field(8, ge=1, description="samples that a step looks at")
    seed: int = Field(0, ge=0, description="seed of the order of the samples")
    start: Literal["mse", "minmax"] = Field(
        "mse", description="grid of a layer that no earlier step quantized: of least weighted error, or covering it"
    )
    weigh: Literal["tokens", "alike"] = Field(
        "tokens", description="tokens: a token's error counts by its mean square output, as a norm behind sees it"
    )


@dataclass(frozen=True)
class Start:
    """A linear before the descent: what to approximate, and codes on a grid that do so already.

    weight float32 [out, in]: what the other parts leave over, 0 outside the support; base: those other parts' sum
    (None: no others); scale, zero float32 [units]; codes int16, centred (code - zero); given: an earlier step's.
    """

    layer: Layer
    units: Units
    weight: Tensor
    base: Tensor | None
    scale: Tensor
    zero: Tensor
    codes: Tensor
    given: bool

    def origin(self, margin: float) -> Tensor:
        """Positions float32 [out, in] that round to the codes: w / S where it does, else the nearest that does, moved
        towards the code by the share `margin`."""
        off = self.codes - self.weight / self.units.spread(self.scale)
        return self.codes - off.clamp_(-_EDGE, _EDGE).mul_(1.0 - margin)

    def finished(self, codes: Tensor, grid: Grid) -> Layer:
        """The layer with these codes (int8, zero points added) in place of the start's."""
        parts = self.layer.parts[:-1] if self.given else self.layer.parts
        held = codes
        if self.layer.support is not None:
            rest = (
                torch.zeros(1, 1, dtype=torch.int8, device=codes.device)
                if grid.zero is None
                else self.units.spread(grid.zero)
            )
            held = torch.where(self.layer.support, codes, rest)
        return replace(self.layer, parts=(*parts, QuantizedPart(self.units.form, held, grid)))

    def masked(self, value: Tensor) -> Tensor:
        """`value` with 0 outside the support, plus the other parts."""
        value = value if self.layer.support is None else value * self.layer.support
        return value if self.base is None else value + self.base


class Fitted(Protocol):
    """One linear under descent: leaves, and the weight that they stand for."""

    @property
    def parameters(self) -> Sequence[train.Parameter]:
        """The leaves."""
        ...

    def weight(self) -> Tensor:
        """The weight [out, in] for the present leaves, differentiable."""
        ...

    def finish(self) -> Layer:
        """The layer for the present leaves, as it would be stored."""
        ...


Penalty = Callable[[Fitted, float], Tensor | None]


def starts(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: FitOptions) -> dict[str, Start]:
    """Where each linear of the block begins: at an earlier step's codes, or at the nearest ones on a grid of its own.

    Raises PlanError without bits in a target, or where an earlier step used another format than integers.
    """
    return {
        name: _start(layer, io.stats.get(block.anatomy.linear(name).site), targets[name], o)
        for name, layer in block.layers.items()
    }


def _start(layer: Layer, stats: SiteStats | None, target: Target, o: FitOptions) -> Start:
    given = bool(layer.parts) and isinstance(layer.parts[-1], QuantizedPart)
    before = replace(layer, parts=layer.parts[:-1] if given else layer.parts)
    weight = before.rest()
    base = layer.weight - weight if before.parts else None
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    if given:
        part = layer.parts[-1]
        form = part.format if isinstance(part, QuantizedPart) else None
        if not isinstance(part, QuantizedPart) or not isinstance(form, IntegerFormat):
            raise PlanError(f"{layer.name}: only codes of integer formats can be fitted further: leave the step out")
        grid, codes = part.grid, part.codes
    else:
        form = from_target(target)
        seen = stats is not None and stats.count and o.start == "mse"
        importance = stats.second_moment().to(weight) if stats is not None and seen else None
        grid = form.fit(weight, search=o.start, importance=importance)
        codes = form.encode(weight, grid)
    units = Units(form, *weight.shape)
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    centred = (codes - units.spread(zero)).to(torch.int16)
    return Start(layer, units, weight, base, scale, zero, centred, given)


def descend(
    block: FitBlock,
    io: FitIO,
    fitted: Mapping[str, Fitted],
    schedule: train.Schedule,
    o: FitOptions,
    penalty: Penalty | None = None,
) -> BlockFit:
    """Train all linears of a block together; the layers of the best state."""
    order = _samples(len(io.inputs), o)

    def whole() -> float:
        finished = {name: x.finish().decode() for name, x in fitted.items()}
        with torch.no_grad():
            return sum(_losses(block, io, finished, range(len(io.inputs)), o)) / len(io.inputs)

    with torch.no_grad():
        first = {name: x.finish().decode() for name, x in fitted.items()}
        # A mini-batch is judged by what its own samples lose at the start, so that an easy one is not mistaken for
        # progress.
        scale = _losses(block, io, first, range(len(io.inputs)), o) if schedule.steps else []
        del first

    def slope(step: int) -> float:
        chosen = order[step]
        norm = max(sum(scale[n] for n in chosen), 1e-30)
        with torch.no_grad():
            leaves = {name: x.weight() for name, x in fitted.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        with torch.enable_grad():
            total = sum(_losses(block, io, leaves, chosen, o, backward=norm))
        for name, x in fitted.items():
            seen = leaves.pop(name).grad
            with torch.enable_grad():
                if seen is not None:
                    x.weight().backward(seen)  # type: ignore[no-untyped-call]
                extra = None if penalty is None else penalty(x, step / schedule.steps)
                if extra is not None:
                    extra.backward()  # type: ignore[no-untyped-call]
        return total / norm

    parameters = [p for x in fitted.values() for p in x.parameters]
    done = train.minimise(parameters, slope, whole, schedule)
    with torch.no_grad():
        return BlockFit({name: x.finish() for name, x in fitted.items()}, done.start, done.end)


def _samples(count: int, o: FitOptions) -> list[list[int]]:
    """The samples of each step: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(o.seed)
    batch = min(o.batch, count)
    line: list[int] = []
    out: list[list[int]] = []
    for _ in range(o.iters):
        while len(line) < batch:
            line += [n for n in torch.randperm(count, generator=generator).tolist() if n not in line[-batch:]]
        out.append(sorted(line[:batch]))
        line = line[batch:]
    return out


def _losses(
    block: FitBlock,
    io: FitIO,
    weights: Mapping[str, Tensor],
    chosen: Sequence[int],
    o: FitOptions,
    backward: float | None = None,
) -> list[float]:
    """The mean squared error of each chosen sample; with `backward`, gradients of their sum over that number."""
    out: list[float] = []
    for a in range(0, len(chosen), io.piece):
        some = chosen[a : a + io.piece]
        device = next(iter(weights.values())).device
        hidden = torch.cat([io.inputs.read(n, n + 1) for n in some]).to(device)
        wanted = torch.cat([io.targets.read(n, n + 1) for n in some]).to(device)
        error = (block.run(weights, hidden) - wanted).square().mean(2)
        if o.weigh == "tokens":
            error = error / wanted.square().mean(2).clamp_(min=1e-12)
        each = error.mean(1)
        if backward is not None:
            (each.sum() / backward).backward()  # type: ignore[no-untyped-call]
        out += each.detach().tolist()
    return out
