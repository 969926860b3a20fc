"""Every stored weight against the original's, one block of each at a time.

A rewrite such as AWQ moves scales between tensors without changing what the block computes, so weights are compared in
the compressed model's own coordinates: a compressed linear stands for diag(r) W diag(c), where c follows exactly from
the gain of the norm before it, and where two linears are linked (v and o, up and down) r and c are fitted to the
producer's rows. What is left beyond that is error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, log, prod
from statistics import median

import torch
from torch import Tensor

from lilliput.anatomy.model import Block, Link
from lilliput.model.block import BlockWeights
from lilliput.model.stored import Model

Pair = tuple[Tensor, Tensor]  # a weight float32 [out, in] of the compressed model, and the original's
_FOLDED = 0.05  # |log| of a gain or row factor from which on it is a fold and no rounding
_SAMPLE = 1 << 16
FAR = 4.0  # times the median error of a matrix's rows, and
BROKEN = 0.7  # a relative error, from which on a row looks damaged
_OFF = log(1.5)  # |log| of a gain's entry from which on it looks damaged, and
_SPREAD = 8.0  # times the median of them
_TURNED = 0.5  # cosine between weights under which the model's coordinates are other ones altogether


@dataclass(frozen=True)
class RowErrors:
    """Relative errors of a matrix's rows: their median, the largest, its row, and how many are `FAR` from the median.

    Rows of a twentieth of the usual norm and less do not count.
    """

    usual: float
    worst: float
    row: int
    count: int

    @staticmethod
    def of(ours: Tensor, aligned: Tensor) -> RowErrors | None:
        """None for what is no matrix or has fewer than 8 rows."""
        if ours.dim() != 2 or len(ours) < 8:
            return None
        size = aligned.norm(dim=1)
        error = (ours - aligned).norm(dim=1) / size
        error = torch.where(size > 0.05 * size.median(), error, 0.0)
        usual, (worst, row) = float(error.median()), error.max(0)
        far = (error > FAR * usual) & (error > BROKEN)
        return RowErrors(usual, float(worst), int(row), int(far.sum()))


@dataclass(frozen=True)
class EntryErrors:
    """Entries of a gain that no linear after it compensates, as |log| of the remaining factor: their median, the
    largest, its entry, and how many stand out."""

    usual: float
    worst: float
    entry: int
    count: int

    @staticmethod
    def of(factors: Sequence[Tensor]) -> EntryErrors:
        """From the factors [in] of the columns of each linear after the gain, 1 for none. An entry counts with the
        linear in which it is least off: rounding moves the columns of each linear differently, a damaged gain moves all
        alike."""
        away = torch.stack([x.clamp(min=1e-3).log() for x in factors])
        away -= away.median(1, keepdim=True).values
        alike = (away > 0).all(0) | (away < 0).all(0)
        least = torch.where(alike, away.abs().amin(0), 0.0)
        usual, (worst, entry) = float(least.median()), least.max(0)
        far = (least > _OFF) & (least > _SPREAD * usual)
        return EntryErrors(usual, float(worst), int(entry), int(far.sum()))


@dataclass(frozen=True)
class WeightLoss:
    """A tensor of a block of the compressed model beside the original's.

    linear: whether it is the weight of a linear, which `name` and `role` then tell; of other tensors the role is
    the name relative to the block; `rows`: errors of a linear's rows one by one; `entries`: of a norm's gain.
    error: Frobenius norm of the difference over that of the weight, coordinates aligned; level: median of
    log(compressed / original) over the larger weights, near 0 unless something scaled the tensor as a whole;
    cosine: between both before alignment, `fit` after it; zeros: share of exact zeros. Where a fold moves scales
    between two tensors, only their product can be held against the original: both then have its level, `partner`
    names the other linear, and `raw` is the level of each by itself, fold included.
    """

    name: str
    block: int
    role: str
    linear: bool
    error: float
    level: float
    cosine: float
    fit: float
    zeros: float
    raw: float
    partner: str | None = None
    rows: RowErrors | None = None
    entries: EntryErrors | None = None


@dataclass(frozen=True)
class Alignment:
    """Factors of a linear's rows and columns [out], [in] that folds account for; None where there is no fold."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The original's weight [out, in] in the compressed model's coordinates."""
        if self.rows is not None:
            weight = weight * self.rows[:, None]
        return weight if self.columns is None else weight * self.columns


def _gain(weights: BlockWeights, link: Link) -> Tensor:
    return (weights.tensor(f"{link.producer}.weight").float() + link.offset)[link.index]


def _row_factors(ours: Tensor, base: Tensor) -> Tensor:
    """Least-squares factor of each row: ours ~ a * base; 1 for rows of zeros."""
    energy = base.square().sum(1)
    factor = (ours * base).sum(1) / energy.clamp(min=1e-30)
    return torch.where((energy > 0) & (factor > 0), factor, 1.0)


def _column_factors(ours: Tensor, base: Tensor) -> Tensor:
    """Least-squares factor of each column [in]; where it is below 1, of the weights that pruning has left."""
    whole = _row_factors(ours.T, base.T)
    factors = _row_factors(ours.T, torch.where(ours == 0, 0.0, base).T)
    return torch.where(whole < 1, factors.clamp(max=1.0), whole)


def producers(block: Block, ours: BlockWeights, base: BlockWeights) -> dict[str, Pair]:
    """Both weights of the linears whose rows a fold may have scaled, by name."""
    names = dict.fromkeys(x.producer for x in block.links if x.kind == "linear")
    return {n: (ours.linear(block.linear(n)), base.linear(block.linear(n))) for n in names}


def align(
    block: Block,
    ours: BlockWeights,
    base: BlockWeights,
    pairs: Mapping[str, Pair],
    levels: Mapping[str, float] | None = None,
) -> dict[str, Alignment]:
    """How the linears of a block are folded. `pairs`: what `producers` gives. `levels`: by linear, a level beyond doubt
    wrong, which is no fold."""
    wrong = levels or {}
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for link in block.links:
        if link.kind == "norm":
            factor = _gain(base, link) / _gain(ours, link)
            if bool(torch.isfinite(factor).all()) and float(factor.abs().log().abs().max()) > 1e-3:
                for reader in link.readers:
                    columns[reader] = columns[reader] * factor if reader in columns else factor
    for link in block.links:
        if link.kind == "linear":
            mine, weight = pairs[link.producer]
            if link.producer in columns:
                weight = weight * columns[link.producer]
            factor = _row_factors(mine, weight) / torch.tensor(wrong.get(link.producer, 0.0)).exp()
            used = factor[link.index]
            # Rounding leaves every row near 1; a fold moves many of them.
            if float((used.log().abs() > _FOLDED).float().mean()) > 0.1:
                rows[link.producer] = factor
                for reader in link.readers:
                    columns[reader] = 1.0 / used
    return {x.name: Alignment(rows.get(x.name), columns.get(x.name)) for x in block.linears}


def level_of(ours: Tensor, base: Tensor) -> float:
    """Median of log(ours / base) over the larger half of the weights, of at most 65,536 of them."""
    a, b = ours.reshape(-1), base.reshape(-1)
    step = max(1, len(a) // _SAMPLE)
    a, b = a[::step], b[::step]
    large = b.abs() >= b.abs().median()
    ratio = a[large] / b[large]
    ratio = ratio[torch.isfinite(ratio) & (ratio > 0)]
    return float(ratio.log().median()) if len(ratio) else 0.0


def compare(model: Model, against: Model, index: int) -> list[WeightLoss]:
    """The tensors of block `index`: its linears, then its other tensors. Each weight is read once."""
    block = against.anatomy().blocks[index]
    ours, base = BlockWeights(model, index, block), BlockWeights(against, index, block)
    pairs = producers(block, ours, base)
    aligned = align(block, ours, base, pairs)
    readers = {reader for link in block.links if link.kind == "norm" for reader in link.readers}
    remainders: dict[str, Tensor] = {}
    out: list[WeightLoss] = []
    for linear in block.linears:
        paired = linear.name in pairs
        v, w = pairs.pop(linear.name) if paired else (ours.linear(linear), base.linear(linear))
        name = f"{base.prefix}.{linear.name}"
        fitting = aligned[linear.name].apply(w)
        out.append(_loss(name, index, linear.role, True, v, w, fitting))
        if linear.name in readers:
            remainders[name] = _column_factors(v, fitting)
    out = _linked(out, block, base.prefix, aligned)
    named = {x.name: x for x in out}
    gains = {
        f"{link.producer}.weight": [f"{base.prefix}.{reader}" for reader in link.readers]
        for link in block.links
        if link.kind == "norm"
    }
    linears = {f"{x.name}.weight" for x in block.linears}
    for name in base.names():
        if name in linears or prod(against.shape(base.canonical(name))) < 2:
            continue
        v, w = ours.tensor(name).float(), base.tensor(name).float()
        row = _loss(base.canonical(name), index, name, False, v, w, w)
        if name in gains:
            # A fold moves scales between a gain and the linears after it, where the error is measured; a gain that
            # moved without them shows in their levels.
            missed = abs(median(named[x].level for x in gains[name])) > 0.5 * abs(row.level)
            entries = EntryErrors.of([remainders[x] for x in gains[name]])
            row = replace(row, error=0.0, fit=1.0, level=row.level if missed else 0.0, entries=entries)
        out.append(row)
    return out


def _loss(name: str, block: int, role: str, linear: bool, ours: Tensor, base: Tensor, aligned: Tensor) -> WeightLoss:
    a, b = ours.reshape(-1), base.reshape(-1)
    norm = float(a.norm() * b.norm())
    whole = float(aligned.norm())
    level = level_of(ours, aligned)
    return WeightLoss(
        name=name,
        block=block,
        role=role,
        linear=linear,
        error=float((ours - aligned).norm()) / whole if whole > 0 else float(a.norm() > 0),
        level=level,
        cosine=float(a @ b) / norm if norm > 0 else 1.0,
        fit=float(a @ aligned.reshape(-1)) / (float(a.norm()) * whole) if norm > 0 and whole > 0 else 1.0,
        zeros=float((ours == 0).float().mean()),
        raw=level,
        rows=RowErrors.of(ours, aligned) if linear else None,
    )


def _linked(losses: list[WeightLoss], block: Block, prefix: str, aligned: Mapping[str, Alignment]) -> list[WeightLoss]:
    """The same with linears that share a fold paired off."""
    named = {x.name: x for x in losses}
    for link in block.links:
        rows = aligned[link.producer].rows if link.kind == "linear" else None
        if rows is None:
            continue
        raw = float(rows[link.index].log().median())
        producer = f"{prefix}.{link.producer}"
        for reader in (f"{prefix}.{x}" for x in link.readers):
            product = named[reader].level
            named[producer] = replace(named[producer], level=product, raw=raw, partner=reader)
            named[reader] = replace(named[reader], raw=product - raw, partner=producer)
    return list(named.values())


def is_rotated(losses: list[WeightLoss]) -> bool:
    """Whether the residual stream of the compressed model has other coordinates, as after a rotation."""
    linears = [x for x in losses if x.linear and not isnan(x.cosine)]
    low = sum(abs(x.cosine) < _TURNED for x in linears)
    return low > len(linears) / 2
