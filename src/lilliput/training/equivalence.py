"""Scales and shifts of channels that are learned with the weights behind them and fold away afterwards.

Along a link of the anatomy channel j is what the producer gives, (y_j - d_j) / s_j, and its readers have s_j W and the
bias b + W d: without rounding the block computes what it did. s_j = exp(t_j), one t for all channels that share a row
of the producer; d_j in units of the root mean square of channel j, where a norm and all its readers have biases. All
begin at 0. Only links take part whose linears are all fitted together and have nothing in front of their codes: what an
earlier step has rounded cannot be scaled any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.anatomy.model import Link
from lilliput.errors import PlanError
from lilliput.folds.kinds import ScaleFold, ShiftFold
from lilliput.stats.site import SiteStats
from lilliput.training.minimise import Parameter
from lilliput.verbs.view import FitBlock

_WIDEST = 4.0  # of |t|: factors between 1/55 and 55


@dataclass(frozen=True)
class Move:
    """What is learned along a link. place int64 [width]: the entry of t that a channel has."""

    link: Link
    place: Tensor
    log: Parameter
    shift: Parameter | None
    unit: Tensor  # of shifts, float32 [width]

    def scale(self) -> Tensor:
        """s [width]."""
        return self.log.value.exp()[self.place]

    def moved(self) -> Tensor | None:
        """d [width]; None: the link has no place for it."""
        return None if self.shift is None else self.shift.value * self.unit


@dataclass(frozen=True)
class Factor:
    """What moves do to rows [start, stop) of a linear's weight."""

    reads: Sequence[Move]
    gives: Sequence[Move]
    start: int
    stop: int

    def rows(self, start: int, stop: int) -> Factor:
        return replace(self, start=self.start + start, stop=self.start + stop)

    def apply(self, weight: Tensor) -> Tensor:
        """weight [stop - start, in] as it is for the present leaves, differentiable by them."""
        for move in self.reads:
            weight = weight * move.scale()
        for move in self.gives:
            index = move.link.index.to(weight.device)
            inverse = torch.ones(max(self.stop, int(index.max()) + 1), device=weight.device)
            inverse = inverse.index_put((index,), 1.0 / move.scale())
            weight = weight * inverse[self.start : self.stop, None]
        return weight


@dataclass(frozen=True)
class Equivalence:
    """All moves of a block."""

    block: FitBlock
    moves: Sequence[Move]

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [p for x in self.moves for p in (x.log, x.shift) if p is not None]

    def factor(self, name: str) -> Factor | None:
        """What becomes of a linear; None where no move touches it."""
        reads = [x for x in self.moves if name in x.link.readers]
        gives = [x for x in self.moves if name == x.link.producer]
        return Factor(reads, gives, 0, len(self.block.layers[name].weight)) if reads or gives else None

    def vectors(self) -> dict[str, Tensor]:
        """Gains and biases that differ from the block's own, by name, differentiable."""
        out: dict[str, Tensor] = {}

        def change(name: str, become: Callable[[Tensor], Tensor]) -> None:
            if name in self.block.vectors:
                out[name] = become(out.get(name, self.block.vectors[name]))

        for move in self.moves:  # shifts first: what comes behind them is scaled with them
            shift = move.moved()
            if shift is not None:
                _shifted(change, self.block, move.link, shift)
        for move in self.moves:
            index, inverse = move.link.index, 1.0 / move.scale()
            offset = move.link.offset if move.link.kind == "norm" else 0.0
            change(f"{move.link.producer}.bias", lambda x, i=index, f=inverse: _scaled(x, i, f, 0.0))  # type: ignore[misc]
            if move.link.kind == "norm":
                gain = f"{move.link.producer}.weight"
                change(gain, lambda x, i=index, f=inverse, o=offset: _scaled(x, i, f, o))  # type: ignore[misc]
        return out

    def folds(self) -> tuple[ScaleFold | ShiftFold, ...]:
        """The present leaves as folds, in the order in which `vectors` carries them out."""
        with torch.no_grad():
            shifts = [(x.link, shift) for x in self.moves if (shift := x.moved()) is not None]
            return (
                *(ShiftFold(link, shift) for link, shift in shifts),
                *(ScaleFold(x.link, x.scale()) for x in self.moves),
            )


def _scaled(value: Tensor, index: Tensor, factor: Tensor, offset: float) -> Tensor:
    index = index.to(value.device)
    return value.index_put((index,), (value[index] + offset) * factor - offset)


def _shifted(
    change: Callable[[str, Callable[[Tensor], Tensor]], None], block: FitBlock, link: Link, shift: Tensor
) -> None:
    for reader in link.readers:
        more = block.layers[reader].weight @ shift
        change(f"{reader}.bias", lambda x, more=more: x + more)  # type: ignore[misc]
    change(f"{link.producer}.bias", lambda x: x - shift)


def begin(block: FitBlock, stats: Mapping[str, SiteStats], norms_only: bool, rate: float) -> Equivalence:
    """The moves of a block, all at the identity; steps of their leaves are `rate` times the schedule's.

    Raises PlanError where the block has links and none of them can take part.
    """
    links = [x for x in block.anatomy.links if x.kind == "norm" or not norms_only]
    able = [x for x in links if _able(block, x)]
    if links and not able:
        some = next(iter(block.layers))
        raise PlanError(
            f"scales cannot be learned in the block of {block.layers[some].name}: every link has a linear that this "
            "step does not fit from its plain weights. Let the step cover all linears that read an input, with no step "
            "that quantizes or transforms before it, or set let: none"
        )
    moves: list[Move] = []
    for link in able:
        device = block.layers[link.readers[0]].weight.device
        rows, place = link.index.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        seen = stats.get(link.site)
        unit = torch.zeros(len(place), device=device)
        if link.shifts and seen is not None and seen.count:
            unit = seen.second_moment().to(device, torch.float32).sqrt()
        moves.append(
            Move(
                link,
                place.to(device),
                Parameter(torch.zeros(len(rows), device=device, requires_grad=True), rate, -_WIDEST, _WIDEST),
                Parameter(torch.zeros_like(unit, requires_grad=True), rate) if bool(unit.any()) else None,
                unit,
            )
        )
    return Equivalence(block, moves)


def _able(block: FitBlock, link: Link) -> bool:
    linears = (*link.readers, *((link.producer,) if link.kind == "linear" else ()))
    if link.kind == "norm" and f"{link.producer}.weight" not in block.vectors:
        return False
    layers = [block.layers.get(name) for name in linears]
    return all(x is not None and not (x.parts or x.inputs or x.outputs) for x in layers)
