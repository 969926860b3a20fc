"""The tensors of one block as the steps see them: read on demand, with the folds of rewrites applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Linear
from lilliput.errors import LilliputError
from lilliput.folds.changes import Added, Change, Ordered, Scaled, Turned
from lilliput.folds.kinds import Fold, HeadFold, PermuteFold, ScaleFold, ShiftFold
from lilliput.model.weights import Model


class BlockWeights:
    """Tensors of one block under names relative to it. Nothing is kept but what folds do to them: reading is cheap."""

    def __init__(self, model: Model, index: int, anatomy: Block) -> None:
        self.prefix = model.skeleton.block_names[index]
        self.anatomy = anatomy
        self._model = model
        self._values: dict[str, Tensor] = {}  # what a repair has put in place of tensors
        self._changes: dict[str, list[Change]] = {}  # tensor name -> what folds have done to it, in order
        self._offset: dict[str, float] = {}  # gains stored as gain - offset
        self._transposed = {f"{x.name}.weight" for x in anatomy.linears if x.transposed}

    @property
    def device(self) -> str:
        """Where the block is computed with."""
        return self._model.skeleton.device

    def names(self) -> tuple[str, ...]:
        """All tensors of the block, relative names."""
        length = len(self.prefix) + 1
        index = self._model.skeleton.block_names.index(self.prefix)
        return tuple(name[length:] for name in self._model.skeleton.names_of(index))

    def canonical(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    def put(self, linear: Linear, weight: Tensor) -> None:
        """Give a linear another weight, float32 [out, in]. Raises LilliputError where it is not finite."""
        if not bool(torch.isfinite(weight).all()):
            raise LilliputError(f"a repair of {self.prefix}.{linear.name} is not finite: check the calibration data")
        self._values[f"{linear.name}.weight"] = self.to_stored(linear, weight).to("cpu", torch.float32)

    def folded(self, name: str) -> bool:
        """Whether a tensor is another than the model's."""
        return name in self._changes or name in self._values

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored orientation: in its stored dtype, or float32 where a fold computed with it."""
        value = self._values[name] if name in self._values else self._model.read(self.canonical(name))
        changes = self._changes.get(name)
        if changes is None:
            return value
        flipped = name in self._transposed
        value = value.T if flipped else value
        if not all(isinstance(x, Ordered) for x in changes):
            value = value.float() + self._offset.get(name, 0.0)
        for change in changes:
            value = change.apply(value)
        value = value - self._offset[name] if name in self._offset else value
        return (value.T if flipped else value).contiguous()

    def linear(self, linear: Linear) -> Tensor:
        """The weight of a linear, float32 [out, in], contiguous and the caller's own."""
        value = self.tensor(f"{linear.name}.weight").float()
        return (value.T if linear.transposed else value).contiguous()

    def through_folds(self, linear: Linear, squares: Tensor) -> Tensor:
        """Squared gradients [out, in] by a weight that no fold has touched, as those by the weight as it is now."""
        for change in self._changes.get(f"{linear.name}.weight", ()):
            squares = change.squares(squares)
        return squares

    def to_stored(self, linear: Linear, weight: Tensor) -> Tensor:
        """A weight [out, in] in the orientation of its module."""
        return weight.T.contiguous() if linear.transposed else weight

    def fold(self, folds: Iterable[Fold]) -> dict[str, Tensor]:
        """Take folds over; returns, by site, the factor on its inputs that scales amount to."""
        sites: dict[str, Tensor] = {}
        for fold in folds:
            if isinstance(fold, ScaleFold):
                self._scale(fold, sites)
            elif isinstance(fold, ShiftFold):
                self._shift(fold)
            elif isinstance(fold, HeadFold):
                self._turn(fold)
            else:
                self._permute(fold)
        return sites

    def _scale(self, fold: ScaleFold, sites: dict[str, Tensor]) -> None:
        link = fold.link
        scale = fold.scale.detach().to("cpu", torch.float32)
        if scale.shape != link.index.shape or not bool(torch.isfinite(scale).all()) or float(scale.min()) <= 0:
            raise LilliputError(f"a rewrite gave unusable scales for {self.prefix}.{link.producer}")
        if not torch.equal(link.tie(scale), scale):
            raise LilliputError(f"scales for {self.prefix}.{link.producer} differ where query heads share a row")
        inverse = torch.ones(self._height(link.producer))
        inverse[link.index] = 1.0 / scale
        for suffix in ("weight", "bias"):
            self._change(f"{link.producer}.{suffix}", Scaled(0, inverse))
        if link.offset:
            self._offset[f"{link.producer}.weight"] = link.offset
        for reader in link.readers:
            self._change(f"{reader}.weight", Scaled(1, scale))
        for site in {x.site for x in self.anatomy.linears if x.name in link.readers}:
            sites[site] = sites.get(site, torch.ones_like(scale)) / scale

    def _shift(self, fold: ShiftFold) -> None:
        link = fold.link
        shift = fold.shift.detach().to("cpu", torch.float32)
        if not link.shifts:
            raise LilliputError(
                f"{self.prefix}.{link.producer} or what reads it has no bias, so its output cannot be shifted"
            )
        if shift.shape != link.index.shape or not bool(torch.isfinite(shift).all()):
            raise LilliputError(f"a rewrite gave an unusable shift for {self.prefix}.{link.producer}")
        for reader in link.readers:
            self._change(f"{reader}.bias", Added(self.linear(self.anatomy.linear(reader)) @ shift))
        self._change(f"{link.producer}.bias", Added(-shift))

    def _turn(self, fold: HeadFold) -> None:
        link, matrices = fold.link, fold.matrices.detach().to("cpu", torch.float64)
        if not link.head:
            raise LilliputError(f"the heads of {self.prefix}.{link.producer} cannot be turned")
        rows, which = link.heads()
        square = matrices.shape == (len(rows), link.head, link.head)
        off = (matrices.mT @ matrices - torch.eye(link.head, dtype=torch.float64)).abs().max() if square else 1.0
        if not float(off) < 1e-8:
            raise LilliputError(f"a rewrite gave no rotations of the heads of {self.prefix}.{link.producer}")
        for suffix in ("weight", "bias"):
            self._change(f"{link.producer}.{suffix}", Turned(0, rows, matrices))
        stretches = torch.arange(len(link.index)).view(-1, link.head)
        for reader in link.readers:
            self._change(f"{reader}.weight", Turned(1, stretches, matrices[which]))

    def _permute(self, fold: PermuteFold) -> None:
        channels, order = fold.channels, fold.order.detach().to("cpu", torch.int64)
        if not torch.equal(order.sort().values, torch.arange(channels.width)):
            raise LilliputError(f"a rewrite gave no order of the channels of {self.prefix}.{channels.readers[0]}")
        rows: dict[str, Tensor] = {}
        for name, index in channels.rows:  # a linear may hold gate and up
            rows.setdefault(name, torch.arange(self._height(name)))[index] = index[order]
        for name, whole in rows.items():
            for suffix in ("weight", "bias"):
                self._change(f"{name}.{suffix}", Ordered(0, whole))
        for name in channels.readers:
            self._change(f"{name}.weight", Ordered(1, order))

    def _change(self, name: str, change: Change) -> None:
        """Note a change of a tensor, if the model has one of that name."""
        if self.canonical(name) in self._model.skeleton.shapes:
            self._changes.setdefault(name, []).append(change)

    def _height(self, name: str) -> int:
        """Rows of a linear, or entries of a norm."""
        return self._model.shape(self.canonical(f"{name}.weight"))[1 if self._is_transposed(name) else 0]

    def _is_transposed(self, linear: str) -> bool:
        return f"{linear}.weight" in self._transposed
