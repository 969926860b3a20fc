"""A model whose residual stream lives in other bases: every tensor is rotated while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy
from lilliput.errors import LilliputError
from lilliput.model.residual import Change, Outside, Residual, residual
from lilliput.model.weights import Model, stretches

ROWS = 1 << 12  # rows of an embedding or head that are rotated at a time


@final
class RotatedModel(Model):
    """`base` in the bases Q_0 .. Q_n of its n blocks and its head: computes the same function.

    Norm gains move into the linears that read them. Then, in block i, readers W <- W Q_i and writers W <- Q_iT W; the
    embedding E <- E Q_0 and the head W <- W Q_n. With one basis for all that is the whole change, and any code that
    takes a Model runs it; where they differ, the caller multiplies the hidden states after block i by `transition(i)`.
    A tied head is untied, because the gain of the final norm goes into it alone.

    Block tensors that change are read in float32, those outside the blocks in the dtype of the files, or in float32 as
    well where the model is to be `exact` rather than what would be written. `stream`: the base's `residual`, if known
    already. Raises PlanError with the reason if the model's residual stream cannot be rotated.
    """

    def __init__(
        self, base: Model, bases: Sequence[Tensor] = (), *, exact: bool = False, stream: Residual | None = None
    ) -> None:
        stream = residual(base) if stream is None else stream
        self.base = base
        self.bases: tuple[Tensor, ...] = tuple(bases)
        self.exact = exact
        self.source, self.skeleton, self.notes = base.source, stream.skeleton, base.notes
        self.carried, self.copies, self.fused = base.carried, base.copies, base.fused
        self.refs = {name: base.refs[self._below(name)] for name in stream.skeleton.shapes}
        self._stream = stream
        self._factors = _shared(self.bases)
        if self.bases and len(self.bases) != len(self.skeleton.block_names) + 1:
            raise LilliputError(
                f"{len(self.skeleton.block_names)} blocks and a head take one basis each, not {len(bases)}"
            )

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def raw(self) -> Mapping[str, Any]:
        return self.base.raw

    @property
    def outside(self) -> Outside:
        """The tensors outside the blocks that take part in a rotation."""
        return self._stream.outside

    def change(self, canonical: str) -> Change | None:
        """How a rotation enters a tensor, None where it does not."""
        return self._stream.changes.get(canonical)

    def within(self, bases: Sequence[Tensor], *, exact: bool = False) -> RotatedModel:
        """The base in other bases."""
        return RotatedModel(self.base, bases, exact=exact, stream=self._stream)

    def over(self, base: Model) -> RotatedModel:
        """Another base of the same make and sizes, in the same bases."""
        return RotatedModel(base, self.bases, exact=self.exact, stream=self._stream)

    def rotated(self, matrix: Tensor) -> RotatedModel:
        """The model with its whole residual stream rotated further, by an orthogonal matrix [hidden, hidden]."""
        hidden = self.skeleton.hidden_size
        if tuple(matrix.shape) != (hidden, hidden):
            raise LilliputError(f"a rotation of this model is [{hidden}, {hidden}], not {list(matrix.shape)}")
        wide = matrix.double()
        off = float((wide.T @ wide - torch.eye(hidden, dtype=torch.float64)).abs().max())
        if not off < 1e-8:
            raise LilliputError(f"a rotation must be orthogonal, but this one is off by {off:.1e}")
        before = self.bases or (None,) * (len(self.skeleton.block_names) + 1)
        products = {id(q): wide if q is None else q @ wide for q in before}
        return self.within([products[id(q)] for q in before], exact=self.exact)

    def transition(self, block: int) -> Tensor | None:
        """The factor on hidden states after a block: Q_iT Q_(i+1), or None if the basis does not change."""
        if not self.bases or self.bases[block] is self.bases[block + 1]:
            return None
        return self.bases[block].T @ self.bases[block + 1]

    def anatomy(self) -> Anatomy:
        return self._stream.anatomy

    def stored_name(self, canonical: str) -> str:
        return self.base.stored_name(canonical)

    def shape(self, canonical: str) -> tuple[int, ...]:
        return self.base.shape(self._below(canonical))

    def dtype(self, canonical: str) -> torch.dtype:
        return self.base.dtype(self._below(canonical))

    def parts(self, canonical: str) -> tuple[str, ...]:
        return self.base.parts(self._below(canonical))

    def read(self, canonical: str) -> Tensor:
        """A tensor by canonical name, rotated; contiguous, on the CPU."""
        value = self.base.read(self._below(canonical))
        change = self.change(canonical)
        if change is None:
            return value
        if change.kind == "outside":
            return self._turn_rows(value, change)
        if change.kind == "gain":
            return torch.full_like(value, 1.0 - change.offset)
        wide = value.float()
        if change.gain is not None:
            gain = self._gain(change)
            wide = wide * (gain[:, None] if change.transposed else gain)
        if not self.bases:
            return wide
        return turn(wide, self._factors[change.place], change.kind, change.transposed).contiguous()

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, rotated."""
        change = self.change(canonical)
        if change is not None and change.kind != "outside":
            return self.read(canonical)[start:stop].contiguous()
        value = self.base.read_rows(self._below(canonical), start, stop)
        return value if change is None else self._turn_rows(value, change)

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        """Whole stretches: how a row of a matrix product is rounded depends on how many rows there are."""
        return stretches(rows, self.shape(canonical)[0])

    def _below(self, canonical: str) -> str:
        """The base's name of a tensor: of a head that was tied, the embedding's."""
        tied = self.base.tied and canonical == self.skeleton.head
        return self.base.skeleton.head if tied else canonical

    def _gain(self, change: Change) -> Tensor:
        if change.gain is None:
            raise RuntimeError(f"no norm moves into a {change.kind}")
        return self.base.read(change.gain).float() + change.offset

    def _turn_rows(self, value: Tensor, change: Change) -> Tensor:
        gain = None if change.gain is None else self._gain(change)
        value = value.float() if self.exact else value
        for start in range(0, len(value), ROWS):
            part = value[start : start + ROWS].float()
            part = part if gain is None else part * gain
            value[start : start + ROWS] = part @ self._factors[change.place] if self.bases else part
        return value


def ready(model: Model) -> RotatedModel:
    """The model as one that can be rotated. Raises PlanError where it cannot be."""
    return model if isinstance(model, RotatedModel) else RotatedModel(model)


def turn(value: Tensor, matrix: Tensor, kind: str, transposed: bool) -> Tensor:
    """A tensor in the new basis. Differentiable in both."""
    if kind == "writer":
        return value @ matrix if transposed else matrix.T @ value
    return matrix.T @ value if kind == "reader" and transposed else value @ matrix


def _shared(bases: Sequence[Tensor]) -> list[Tensor]:
    """The bases in float32; equal objects stay one object."""
    narrow = {id(q): q.to(torch.float32) for q in bases}
    return [narrow[id(q)] for q in bases]
