"""A model whose residual stream lives in other bases: every tensor is rotated while it is read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.model.stored import Model
from lilliput.source.names import Names

TOLERANCE = 1e-4  # relative change of logits in float32
ROWS = 1 << 12  # rows of an embedding or head that are rotated at a time
VOCABULARY = 64  # rows of the embedding on which the rotation is tried out


@dataclass(frozen=True)
class Outside:
    """What an orthogonal change of basis touches beyond the blocks. `norm`: the final norm's gain, offset + weight."""

    embeddings: tuple[str, ...]
    norm: str | None
    offset: float


class RotatedModel(Model):
    """A model in the bases Q_0 .. Q_n of its n blocks and its head: reads like a Model, computes the same function.

    Norm gains move into the linears that read them. Then, in block i, readers W <- W Q_i and writers W <- Q_iT W; the
    embedding E <- E Q_0 and the head W <- W Q_n. With one basis for all that is the whole change, and any code that
    takes a Model runs it; where they differ, the caller multiplies the hidden states behind block i by
    `transition(i)`. A tied head is untied, for the gain of the final norm goes into it alone.

    Block tensors that change are read in float32, those outside the blocks in the dtype of the files, or in float32 as
    well where the model is to be `exact` rather than what would be written. Raises PlanError
    with the reason where the model's residual stream cannot be rotated.
    """

    def __init__(self, base: Model, bases: Sequence[Tensor] = (), *, exact: bool = False) -> None:
        inner: Model = base
        if isinstance(base, RotatedModel):
            inner, skeleton, anatomy, outside = base.inner, base.skeleton, base.anatomy(), base.outside
        else:
            skeleton = _untied(base.skeleton)
            anatomy = replace(base.anatomy(), tied=False, head=skeleton.head)
            outside = verify(skeleton, anatomy)
        refs = dict(inner.refs)
        if inner.tied:
            refs[skeleton.head] = inner.refs[inner.skeleton.head]
        super().__init__(inner.source, skeleton, Names(refs, inner._prefix, {}), inner.notes)
        self.copies, self.carried = inner.copies, inner.carried
        self.notes = inner.notes
        self.inner: Model = inner
        self.outside: Outside = outside
        self.bases: tuple[Tensor, ...] = tuple(bases)
        self.exact = exact
        self._found = anatomy
        self._factors = _shared(self.bases)
        self._changes = _changes(anatomy, outside, skeleton)
        if self.bases and len(self.bases) != len(skeleton.block_names) + 1:
            raise LilliputError(f"{len(skeleton.block_names)} blocks and a head take one basis each, not {len(bases)}")

    def rotated(self, matrix: Tensor) -> RotatedModel:
        """The model with its whole residual stream rotated further, by an orthogonal matrix [hidden, hidden]."""
        hidden = self.skeleton.hidden_size
        if tuple(matrix.shape) != (hidden, hidden):
            raise LilliputError(f"a rotation of this model is [{hidden}, {hidden}], not {list(matrix.shape)}")
        wide = matrix.double()
        off = float((wide.T @ wide - torch.eye(hidden, dtype=torch.float64)).abs().max())
        if not off < 1e-8:
            raise LilliputError(f"a rotation has to be orthogonal, but this one is off by {off:.1e}")
        before = self.bases or (None,) * (len(self.skeleton.block_names) + 1)
        made = {id(q): wide if q is None else q @ wide for q in before}
        return RotatedModel(self, [made[id(q)] for q in before], exact=self.exact)

    def anatomy(self) -> Anatomy:
        return self._found

    def stored_name(self, canonical: str) -> str:
        if self.inner.tied and canonical == self.skeleton.head:
            return self.inner.stored_name(canonical)
        return super().stored_name(canonical)

    def transition(self, block: int) -> Tensor | None:
        """What hidden states behind a block are multiplied by: Q_iT Q_(i+1), or None where the basis stays."""
        if not self.bases or self.bases[block] is self.bases[block + 1]:
            return None
        return self.bases[block].T @ self.bases[block + 1]

    def raw(self, canonical: str) -> Tensor:
        """A block's tensor with norm gains moved, float32 where that changes it, but not rotated."""
        change = self._changes.get(canonical)
        value = super().read(canonical)
        if change is None:
            return value
        if change.kind == "gain":
            return torch.full_like(value, 1.0 - change.offset)
        wide = value.float()
        if change.gain is not None:
            gain = super().read(change.gain).float() + change.offset
            wide = wide * (gain[:, None] if change.transposed else gain)
        return wide

    def read(self, canonical: str) -> Tensor:
        """A tensor by canonical name, rotated; contiguous, on the CPU."""
        change = self._changes.get(canonical)
        if change is None:
            return super().read(canonical)
        if change.kind == "outside":
            return self._read_rows(canonical, change)
        value = self.raw(canonical)
        if change.kind == "gain" or not self.bases:
            return value
        return turn(value, self._factors[change.place], change.kind, change.transposed).contiguous()

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, rotated."""
        change = self._changes.get(canonical)
        if change is None:
            return super().read_rows(canonical, start, stop)
        if change.kind != "outside":
            return self.read(canonical)[start:stop].contiguous()
        return self._turn_rows(super().read_rows(canonical, start, stop), change)

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        """Whole stretches: how a row of a matrix product is rounded depends on how many rows there are."""
        return self._stretches(canonical, rows)

    def _read_rows(self, canonical: str, change: Change) -> Tensor:
        return self._turn_rows(super().read(canonical), change)

    def _turn_rows(self, value: Tensor, change: Change) -> Tensor:
        gain = None if change.gain is None else super().read(change.gain).float() + change.offset
        value = value.float() if self.exact else value
        for start in range(0, len(value), ROWS):
            part = value[start : start + ROWS].float()
            part = part if gain is None else part * gain
            value[start : start + ROWS] = part @ self._factors[change.place] if self.bases else part
        return value

    def change(self, canonical: str) -> Change | None:
        """How a rotation enters a tensor, None where it does not."""
        return self._changes.get(canonical)


def prepared(model: Model, rotates: bool) -> Model:
    """The model as a recipe's steps need it: ready to be rotated where one of them learns a rotation.

    Raises PlanError where that cannot be.
    """
    return RotatedModel(model) if rotates else model


def resident(width: int) -> int:
    """Bytes that a rotation of the residual stream keeps: in float64 to compose it, in float32 to apply it."""
    return 12 * width * width


@dataclass(frozen=True)
class Change:
    """How a rotation enters one tensor.

    kind: "gain" (moved away), "reader" (W R), "writer" (RT W), "bias" (b R, a writer's) or "outside" (rows R). place:
    which basis. gain: the norm whose offset + weight enters the columns first.
    """

    kind: str
    place: int
    transposed: bool = False
    gain: str | None = None
    offset: float = 0.0


def turn(value: Tensor, matrix: Tensor, kind: str, transposed: bool) -> Tensor:
    """A tensor in the new basis. Differentiable in both."""
    if kind == "writer":
        return value @ matrix if transposed else matrix.T @ value
    return matrix.T @ value if kind == "reader" and transposed else value @ matrix


def _shared(bases: Sequence[Tensor]) -> list[Tensor]:
    """The bases in float32; equal objects stay one object."""
    made = {id(q): q.to(torch.float32) for q in bases}
    return [made[id(q)] for q in bases]


def _changes(anatomy: Anatomy, outside: Outside, skeleton: Skeleton) -> Mapping[str, Change]:
    found: dict[str, Change] = {}
    last = len(anatomy.blocks)
    for i, (prefix, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True)):
        offsets = {x.producer: x.offset for x in block.links if x.kind == "norm"}
        linears = {x.name: x for x in block.linears}
        for norm, readers in block.residual_readers:
            gain = f"{prefix}.{norm}.weight"
            found[gain] = Change("gain", i, offset=offsets[norm])
            for name in readers:
                flipped = linears[name].transposed
                found[f"{prefix}.{name}.weight"] = Change("reader", i, flipped, gain, offsets[norm])
        for name in block.residual_writers:
            found[f"{prefix}.{name}.weight"] = Change("writer", i, linears[name].transposed)
            if linears[name].bias:
                found[f"{prefix}.{name}.bias"] = Change("bias", i)
    for name in outside.embeddings:
        found[name] = Change("outside", 0)
    found[skeleton.head] = Change("outside", last, gain=outside.norm, offset=outside.offset)
    if outside.norm is not None:
        found[outside.norm] = Change("gain", last, offset=outside.offset)
    return found


def _untied(skeleton: Skeleton) -> Skeleton:
    if not skeleton.tied:
        return skeleton
    config = copy.deepcopy(skeleton.config)
    config.tie_word_embeddings = False
    return Skeleton(config, dtype=skeleton.dtype, device=skeleton.device)


def verify(skeleton: Skeleton, anatomy: Anatomy) -> Outside:
    """What lies outside the blocks and takes part, tried out with random weights on a small vocabulary.

    The blocks were tried when the anatomy was found. Raises PlanError with the reason.
    """
    for block in anatomy.blocks:
        if not block.residual_readers:
            why = [x for x in block.notes if "rotated" in x]
            raise PlanError(
                f"{anatomy.architecture}: {why[0] if why else 'its blocks were not understood'}. Only plain RMS norms, "
                "read by linears, commute with a rotation: leave the rotation out of the recipe"
            )
    small = _small(skeleton)
    rng = torch.Generator().manual_seed(0)
    names = (*small.embeddings, *small.final, *(n for n in small.shapes if n.startswith(small.head.rpartition(".")[0])))
    tensors = {n: torch.randn(small.shapes[n], generator=rng) for n in names}
    width = small.hidden_size
    embeddings = tuple(n for n in small.embeddings if small.shapes[n][-1] == width and len(small.shapes[n]) == 2)
    norm = small.final[0] if len(small.final) == 1 and small.shapes[small.final[0]] == (width,) else None
    ids = torch.arange(8).view(2, 4)
    turned = {n: _reflect(v) if n in embeddings else v for n, v in tensors.items()}
    hidden = _embedded(small, tensors, ids)
    if _apart(_embedded(small, turned, ids), _reflect(hidden)) > TOLERANCE:
        raise PlanError(
            f"{anatomy.architecture} cannot be rotated: its embedding is more than a table of rows; leave the rotation "
            "out of the recipe"
        )
    with torch.no_grad():
        small.load(tensors)
        wanted = small.logits(small.finish(hidden))
        for offset in (0.0, 1.0):
            gain = torch.ones(width) if norm is None else tensors[norm] + offset
            small.load({small.head: _reflect(tensors[small.head] * gain)})
            if norm is not None:
                small.load({norm: torch.full((width,), 1.0 - offset)})
            if _apart(small.logits(small.finish(_reflect(hidden))), wanted) <= TOLERANCE:
                return Outside(embeddings, norm, offset)
    raise PlanError(
        f"{anatomy.architecture} cannot be rotated: its final norm and head do not commute with a rotation (only plain "
        "RMS norms do); leave the rotation out of the recipe"
    )


def _small(skeleton: Skeleton) -> Skeleton:
    """The skeleton with a small vocabulary, in float32, so that its embedding and head cost nothing."""
    config = copy.deepcopy(skeleton.config)
    config.vocab_size = VOCABULARY
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, None if token == "pad_token_id" else 1)
    try:
        return Skeleton(config)
    except (SourceError, ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"no small copy of this model can be built, on which a rotation is tried: {error}") from None


def _embedded(skeleton: Skeleton, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    skeleton.load({n: tensors[n] for n in skeleton.embeddings})
    return skeleton.embed(ids)[0]


def _reflect(x: Tensor) -> Tensor:
    """x [.., n] times a dense orthogonal matrix that is not its own transpose, without building it."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(2):
        v = torch.randn(x.shape[-1], generator=rng)
        x = x - 2 * (x @ v)[..., None] * v / (v @ v)
    return x


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
