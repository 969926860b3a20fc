"""A model whose residual stream lives in other bases: every tensor is rotated while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy
from lilliput.errors import LilliputError
from lilliput.folds.changes import Turned
from lilliput.model.residual import Change, Outside, Residual, residual
from lilliput.model.weights import Model, stretches

Heads = Mapping[int, Sequence[Tensor]]  # see `folds.kinds.HeadRotations`
ROWS = 1 << 12  # rows of an embedding or head that are rotated at a time


@final
class RotatedModel(Model):
    """`base` in the bases Q_0 .. Q_n of its n blocks and its head: computes the same function.

    Norm gains move into the linears that read them. Then, in block i, readers W <- W Q_i and writers W <- Q_iT W; the
    embedding E <- E Q_0 and the head W <- W Q_n. With one basis for all that is the whole change, and any code that
    takes a Model runs it; where they differ, the caller multiplies the hidden states after block i by `transition(i)`.
    A tied head is untied, because the gain of the final norm goes into it alone. Besides, the values of block i may be
    turned within each head by `heads[i]`, for each link whose heads can be turned: V <- RT V, W <- W R in what reads
    them.

    Block tensors that change are read in float32, those outside the blocks in the dtype of the files, or in float32 as
    well where the model is to be `exact` rather than what would be written. `stream`: the base's `residual`, if known
    already. Raises PlanError with the reason if the model's residual stream cannot be rotated.
    """

    def __init__(
        self,
        base: Model,
        bases: Sequence[Tensor] = (),
        *,
        exact: bool = False,
        stream: Residual | None = None,
        heads: Heads | None = None,
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
        self.heads: Heads = heads or {}
        self._turns, self._flipped = _head_turns(stream.anatomy, self.heads)
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
        return RotatedModel(self.base, bases, exact=exact, stream=self._stream, heads=self.heads)

    def over(self, base: Model) -> RotatedModel:
        """Another base of the same make and sizes, in the same bases."""
        return RotatedModel(base, self.bases, exact=self.exact, stream=self._stream, heads=self.heads)

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

    def turned(self, heads: Heads) -> RotatedModel:
        """The model with the heads of some blocks' values turned further. Raises LilliputError for what is no set of
        rotations of theirs."""
        whole = dict(self.heads)
        for block, matrices in heads.items():
            links = [x for x in self._stream.anatomy.blocks[block].links if x.head]
            for link, some in zip(links, matrices, strict=True):
                eye = torch.eye(link.head, dtype=torch.float64)
                if some.shape != (len(link.heads()[0]), link.head, link.head) or not (
                    float((some.double().mT @ some.double() - eye).abs().max()) < 1e-8
                ):
                    raise LilliputError(f"these are no rotations of the heads of {link.producer} in block {block}")
            before = whole.get(block)
            now = [x.double() for x in matrices]
            whole[block] = now if before is None else [a @ b for a, b in zip(before, now, strict=True)]
        return RotatedModel(self.base, self.bases, exact=self.exact, stream=self._stream, heads=whole)

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
        value = self._read(canonical)
        turns = self._turns.get(canonical)
        if turns is None:
            return value
        flipped = canonical in self._flipped
        value = value.float().T if flipped else value.float()
        for turned in turns:
            value = turned.apply(value)
        return (value.T if flipped else value).contiguous()

    def _read(self, canonical: str) -> Tensor:
        """A tensor in the bases, its heads as they were."""
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
        if canonical in self._turns or (change is not None and change.kind != "outside"):
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


def _head_turns(anatomy: Anatomy, heads: Heads) -> tuple[dict[str, list[Turned]], set[str]]:
    """What turning heads does to tensors, by name, weights as [out, in]; and which of those are stored as [in, out]."""
    turns: dict[str, list[Turned]] = {}
    flipped: set[str] = set()
    for block, matrices in heads.items():
        prefix = anatomy.block_names[block]
        flipped |= {f"{prefix}.{x.name}.weight" for x in anatomy.blocks[block].linears if x.transposed}
        links = [x for x in anatomy.blocks[block].links if x.head]
        for link, some in zip(links, matrices, strict=True):
            rows, which = link.heads()
            for suffix in ("weight", "bias"):
                turns.setdefault(f"{prefix}.{link.producer}.{suffix}", []).append(Turned(0, rows, some))
            stretches = torch.arange(len(link.index)).view(-1, link.head)
            for reader in link.readers:
                turns.setdefault(f"{prefix}.{reader}.weight", []).append(Turned(1, stretches, some[which]))
    return turns, flipped


def _shared(bases: Sequence[Tensor]) -> list[Tensor]:
    """The bases in float32; equal objects stay one object."""
    narrow = {id(q): q.to(torch.float32) for q in bases}
    return [narrow[id(q)] for q in bases]
