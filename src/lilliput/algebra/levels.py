"""The sweep and the descent of GPTQ on codebooks: each column's rounding is the nearest level of its row's table.

With tr(D H DT), D = W - What, as the loss, `algebra.obs` sweeps over the columns, and then two exact descents take
turns: tables given codes, and (`algebra.lattice.recode`) codes given tables. Given its codes a row is Z c, Z [in, k] of
zeros and ones, so its best table solves (ZT H Z) c = ZT H w: by conjugate gradients, of which every step is one product
with H for all rows at once.

Matrices are held as [in, out] here. What `obs` calls a code is the level itself, and every scale is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.algebra import lattice, obs
from lilliput.algebra.values import Levels

_STEPS = 2  # of conjugate gradients for a refit
_PANEL = 512  # rows of the Gram matrix that are widened at a time
ROOM = 1 << 18  # weights that are refitted at a time, each of which takes ten numbers in float64 meanwhile


@dataclass(frozen=True)
class Problem:
    """Rows to be rounded: weight float32 [out, in]; gram and its factor in `order` (None: as it is); damping and
    shrinkage as in `obs.factorize`; support: bool [out, in] or None; block: columns between two large products."""

    weight: Tensor
    gram: Tensor
    factor: obs.Factor
    order: Tensor | None
    shrinkage: float
    support: Tensor | None
    block: int = obs.BLOCK


def sweep(problem: Problem, table: Tensor, group: Tensor, stored: torch.dtype, refits: int) -> tuple[Tensor, Tensor]:
    """Values float32 [out, in] on the levels of `table`, and the table as refits left it.

    table: float32 [out, groups, k], ascending, of values of the dtype `stored`, with a level 0 wherever the support has
    a hole; group: int64 [in]. Each of `refits` passes moves the tables of rows whose loss that lowers, and then the
    codes. Values outside the support are 0.
    """
    x = problem
    columns = x.weight.T.contiguous() if x.order is None else x.weight.T[x.order]
    kept_mask = None if x.support is None else x.support.T.contiguous()
    visits = group if x.order is None else group[x.order]
    swept = Levels.of(table, visits.tolist())
    mask = kept_mask if kept_mask is None or x.order is None else kept_mask[x.order]
    values, deviation = torch.empty_like(columns), torch.empty_like(columns)
    for a in range(0, len(columns), x.block):
        b = min(a + x.block, len(columns))
        aim = obs.reach(columns, deviation, x.factor, a, b)
        some = None if mask is None else mask[a:b]
        coupling = x.factor.coupling[a:b, a:b]
        obs.settle(aim, deviation[a:b], columns[a:b], coupling, a, swept, values[a:b], some)
    if x.order is not None:
        values = torch.empty_like(values).index_copy_(0, x.order, values)
        deviation = torch.empty_like(deviation).index_copy_(0, x.order, deviation)
    del columns
    if refits:
        gram = x.gram.clone()
        gram.diagonal().mul_(1.0 + x.shrinkage)
        ridge = x.factor.damping * float(x.gram.diagonal().mean())
        gram.diagonal().add_(ridge)
        fixed = None if kept_mask is None else ~kept_mask
        step = max(1, ROOM // max(len(values), 1))
        for _ in range(refits):
            table = table.clone()
            for a in range(0, len(table), step):
                rows = slice(a, a + step)
                still = None if fixed is None else fixed[:, rows]
                table[rows] = _refit(values[:, rows], deviation[:, rows], gram, table[rows], group, still, stored)
            levels = Levels.of(table, group.tolist())
            lattice.recode(values, deviation, gram, 0.0, levels, kept_mask, 0, len(values))
    return values.T, table


def _refit(
    values: Tensor,
    deviation: Tensor,
    gram: Tensor,
    table: Tensor,
    group: Tensor,
    fixed: Tensor | None,
    stored: torch.dtype,
) -> Tensor:
    """The table [out, groups, k] after one step to the least loss given the codes; values and deviation follow.

    In float64: a level that is stored in few bits should not depend on how a product is cut. A level 0 stays where
    `fixed` [in, out] says that some values are not the table's to move: a hole may need it.
    """
    rows, groups, k = table.shape
    flat = table.flatten(1).T.contiguous().double()
    drift = deviation.double()
    index = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for g in range(groups):
        columns = (group == g).nonzero().squeeze(1)
        one = table[:, g].contiguous()
        places = torch.searchsorted((one[:, 1:] + one[:, :-1]) / 2, values[columns].T.contiguous())
        index[columns] = places.T + g * k
    movable = torch.ones_like(flat) if fixed is None else (flat != 0).double()
    moves = None if fixed is None else (~fixed).double()

    def spread(step: Tensor) -> Tensor:
        out = step.gather(0, index)
        return out if moves is None else out.mul_(moves)

    def collect(slope: Tensor) -> Tensor:
        slope = slope if moves is None else slope * moves
        return torch.zeros_like(flat).scatter_add_(0, index, slope).mul_(movable)

    pull = _times(gram, drift)
    before = (pull * drift).sum(0)
    weight = collect(gram.diagonal().double()[:, None].expand_as(drift))
    scale = torch.where(weight > 0, weight.reciprocal(), 0.0)
    residual = collect(pull)
    step, towards = torch.zeros_like(flat), scale * residual
    size = (residual * towards).sum(0)
    for _ in range(min(_STEPS, k * groups)):
        image = collect(_times(gram, spread(towards)))
        bend = (towards * image).sum(0)
        length = torch.where(bend > 0, size / bend, 0.0)
        step.addcmul_(towards, length)
        residual.addcmul_(image, length, value=-1.0)
        fresh = scale * residual
        after = (residual * fresh).sum(0)
        towards = torch.addcmul(fresh, towards, torch.where(size > 0, after / size, 0.0))
        size = after
    proposal = (flat + step).to(stored).double()
    change = spread(proposal - flat)
    drift_after = drift - change
    better = (_times(gram, drift_after) * drift_after).sum(0) < before
    better &= torch.isfinite(proposal).all(0)
    deviation.copy_(torch.where(better, drift_after, drift))
    values.add_(torch.where(better, change, 0.0))
    accepted = torch.where(better, proposal, flat).float()
    return accepted.T.reshape(rows, groups, k).sort(-1).values


def _times(gram: Tensor, x: Tensor) -> Tensor:
    """gram [in, in] times x [in, out] in float64, without a copy of the whole matrix."""
    out = torch.empty_like(x)
    for a in range(0, len(gram), _PANEL):
        torch.mm(gram[a : a + _PANEL].double(), x, out=out[a : a + _PANEL])
    return out
