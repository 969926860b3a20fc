"""The tensors of one block as the steps see them: read on demand, with the folds of rewrites applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Linear
from lilliput.errors import LilliputError
from lilliput.folds.kinds import Fold, PermuteFold
from lilliput.model.weights import Model


class BlockWeights:
    """Tensors of one block under names relative to it. Nothing is kept but the folded scales: reading is cheap."""

    def __init__(self, model: Model, index: int, anatomy: Block) -> None:
        self.prefix = model.skeleton.block_names[index]
        self.anatomy = anatomy
        self._model = model
        self._values: dict[str, Tensor] = {}  # what a repair has put in place of tensors
        self._rows: dict[str, Tensor] = {}  # tensor name -> factor of its output rows
        self._columns: dict[str, Tensor] = {}  # tensor name -> factor of its input columns
        self._order: dict[str, tuple[int, Tensor]] = {}  # tensor name -> an axis [out, in] in another order
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
        return any(name in x for x in (self._rows, self._columns, self._values, self._order))

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored orientation: in its stored dtype, or float32 where a fold touched it."""
        value = self._values[name] if name in self._values else self._model.read(self.canonical(name))
        if name in self._order:
            axis, order = self._order[name]
            value = value.index_select(1 - axis if name in self._transposed else axis, order)
        if name not in self._rows and name not in self._columns:
            return value
        value = value.float() + self._offset.get(name, 0.0)
        rows, columns = self._rows.get(name), self._columns.get(name)
        if name in self._transposed:
            rows, columns = columns, rows
        if rows is not None:
            value = value * (rows if value.dim() == 1 else rows[:, None])
        if columns is not None:
            value = value * columns
        return value - self._offset.get(name, 0.0)

    def linear(self, linear: Linear) -> Tensor:
        """The weight of a linear, float32 [out, in], contiguous and the caller's own."""
        value = self.tensor(f"{linear.name}.weight").float()
        return (value.T if linear.transposed else value).contiguous()

    def through_folds(self, linear: Linear, squares: Tensor) -> Tensor:
        """Squared gradients [out, in] by a weight that no fold has touched, as those by the weight as it is now."""
        if (moved := self._order.get(f"{linear.name}.weight")) is not None:
            squares = squares.index_select(moved[0], moved[1].to(squares.device))
        for factors, side in ((self._rows, (-1, 1)), (self._columns, (1, -1))):
            factor = factors.get(f"{linear.name}.weight")
            if factor is not None:
                squares = squares / factor.square().view(side)
        return squares

    def to_stored(self, linear: Linear, weight: Tensor) -> Tensor:
        """A weight [out, in] in the orientation of its module."""
        return weight.T.contiguous() if linear.transposed else weight

    def fold(self, folds: Iterable[Fold]) -> dict[str, Tensor]:
        """Take folds over; returns, by site, the factor on its inputs that they amount to."""
        sites: dict[str, Tensor] = {}
        for fold in folds:
            if isinstance(fold, PermuteFold):
                self._permute(fold)
                continue
            link = fold.link
            scale = fold.scale.detach().to("cpu", torch.float32)
            if scale.shape != link.index.shape or not bool(torch.isfinite(scale).all()) or float(scale.min()) <= 0:
                raise LilliputError(f"a rewrite gave unusable scales for {self.prefix}.{link.producer}")
            if not torch.equal(link.tie(scale), scale):
                raise LilliputError(f"scales for {self.prefix}.{link.producer} differ where query heads share a row")
            producer = self._model.shape(self.canonical(f"{link.producer}.weight"))
            width = producer[1 if self._is_transposed(link.producer) else 0]
            inverse = torch.ones(width)
            inverse[link.index] = 1.0 / scale
            for suffix in ("weight", "bias"):
                name = f"{link.producer}.{suffix}"
                if self.canonical(name) in self._model.skeleton.shapes:
                    self._rows[name] = self._rows.get(name, torch.ones(width)) * inverse
                    if link.kind == "norm" and suffix == "weight":
                        self._offset[name] = link.offset
            for reader in link.readers:
                name = f"{reader}.weight"
                self._columns[name] = self._columns.get(name, torch.ones_like(scale)) * scale
            for site in {x.site for x in self.anatomy.linears if x.name in link.readers}:
                sites[site] = sites.get(site, torch.ones_like(scale)) / scale
        return sites

    def _permute(self, fold: PermuteFold) -> None:
        channels, order = fold.channels, fold.order.detach().to("cpu", torch.int64)
        if not torch.equal(order.sort().values, torch.arange(channels.width)):
            raise LilliputError(f"a rewrite gave no order of the channels of {self.prefix}.{channels.readers[0]}")
        rows: dict[str, Tensor] = {}
        for name, index in channels.rows:  # a linear may hold gate and up
            height = self._model.shape(self.canonical(f"{name}.weight"))[1 if self._is_transposed(name) else 0]
            rows.setdefault(name, torch.arange(height))[index] = index[order]
        for name, whole in rows.items():
            for suffix in ("weight", "bias"):
                if self.canonical(f"{name}.{suffix}") in self._model.skeleton.shapes:
                    self._reorder(f"{name}.{suffix}", 0, whole, self._rows)
        for name in channels.readers:
            self._reorder(f"{name}.weight", 1, order, self._columns)

    def _reorder(self, name: str, axis: int, order: Tensor, factors: dict[str, Tensor]) -> None:
        if name in self._order:
            before, was = self._order[name]
            if before != axis:
                raise LilliputError(f"{self.prefix}.{name} is the rows of one MLP and the columns of another")
            self._order[name] = axis, was[order]
        else:
            self._order[name] = axis, order
        if name in factors:
            factors[name] = factors[name][order]

    def _is_transposed(self, linear: str) -> bool:
        return f"{linear}.weight" in self._transposed
