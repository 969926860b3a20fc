"""Structures of inputs removed from a matrix one after the other, each time the one that costs least, while the inputs
that stay make up for those that have left (optimal brain surgeon on groups of columns; ZipLM, arXiv 2302.04089).

With H [n, n] of the inputs and a matrix W whose inputs S leave, the least error and the change that has it are

    cost_S = tr(W_S ([H^-1]_SS)^-1 W_ST),    W <- W - W_S ([H^-1]_SS)^-1 [H^-1]_S,:
    H^-1 <- H^-1 - [H^-1]_:,S ([H^-1]_SS)^-1 [H^-1]_S,:

W itself is not needed, its products P = WT W are: cost_S = tr(P_SS ([H^-1]_SS)^-1). With [H^-1]_SS = L LT,
V = [H^-1]_:,S L^-T, T = P_:,S L^-T, N = L^-1 P_SS L^-T and Z = T - V N / 2 both updates are symmetric and of low rank,

    H^-1 <- H^-1 - V VT,    P <- P - Z VT - V ZT,

so they are gathered in panels and carried out as matrix products; in between only columns that are asked for, and the
diagonal blocks, are brought up to date.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.algebra.obs import regularized

_PANEL = 128  # columns of V between two updates of whole matrices


def removal(weight: Tensor, gram: Tensor, groups: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(order int64 [g], errors float64 [g]): the groups as they leave, and the error of all that have left, as a share
    of that without any input (0 where that is 0).

    weight [out, n]; gram XT X [n, n]; groups int64 [g, d]: columns of each, disjoint; damping: of the Gram matrix's
    mean diagonal. About 5 n^2 d g operations, float64; four matrices of the size of `gram` beside the arguments. Raises
    LilliputError where the Gram matrix holds NaN or infinity.
    """
    count, size = groups.shape
    groups, device = groups.to(gram.device), gram.device
    weight = weight.double()
    energy = weight.T @ weight
    matrix = regularized(gram, damping, 0.0).double()
    whole = float(energy.flatten() @ matrix.flatten())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    del matrix
    inverses = inverse[groups[:, :, None], groups[:, None, :]]
    energies = energy[groups[:, :, None], groups[:, None, :]]
    eye = torch.eye(size, dtype=torch.float64, device=device)
    v, z = (torch.zeros(len(gram), max(_PANEL, size), dtype=torch.float64, device=device) for _ in range(2))
    used, total = 0, 0.0
    gone = torch.zeros(count, dtype=torch.bool, device=device)
    order, errors = [], []
    for _ in range(count):
        cost = _costs(energies, inverses).masked_fill_(gone, torch.inf)
        k = int(cost.argmin())
        order.append(k)
        total += max(float(cost[k]), 0.0)
        errors.append(total)
        own, past_v, past_z = groups[k], v[:, :used], z[:, :used]
        columns = inverse[:, own] - past_v @ past_v[own].T
        crossed = energy[:, own] - past_z @ past_v[own].T - past_v @ past_z[own].T
        lower = torch.linalg.cholesky(columns[own])
        new_v: Tensor = torch.linalg.solve_triangular(lower, columns.T, upper=False).T
        turned: Tensor = torch.linalg.solve_triangular(lower, crossed.T, upper=False).T
        new_z = turned - 0.5 * new_v @ torch.linalg.solve_triangular(lower, turned[own], upper=False)
        of_v, of_z = new_v[groups], new_z[groups]
        inverses -= of_v @ of_v.mT
        mixed = of_z @ of_v.mT
        energies -= mixed + mixed.mT
        gone[k] = True
        inverses[gone], energies[gone] = eye, 0.0
        v[:, used : used + size], z[:, used : used + size] = new_v, new_z
        used += size
        if used + size > v.shape[1]:
            inverse.addmm_(v[:, :used], v[:, :used].T, alpha=-1.0)
            energy.addmm_(z[:, :used], v[:, :used].T, alpha=-1.0)
            energy.addmm_(v[:, :used], z[:, :used].T, alpha=-1.0)
            used = 0
    share = torch.tensor(errors, dtype=torch.float64) / whole if whole > 0.0 else torch.zeros(count).double()
    return torch.tensor(order, dtype=torch.int64), share


def made_up(weight: Tensor, matrix: Tensor, stays: Tensor) -> Tensor:
    """The columns that stay of weight [out, n], changed so that they make up for the others as well as they can.

    float32 [out, kept]: W_K + W_R H_RK (H_KK)^-1 for H = matrix [n, n], positive definite, which is W - W_R
    ([H^-1]_RR)^-1 [H^-1]_R,: on them. stays: bool [n].
    """
    rest = weight[:, ~stays].double() @ matrix[~stays][:, stays].double()
    factor = torch.linalg.cholesky(matrix[stays][:, stays].double())
    added: Tensor = torch.cholesky_solve(rest.T, factor).T
    return added.add_(weight[:, stays]).float()


def _costs(energies: Tensor, inverses: Tensor) -> Tensor:
    """tr(P_SS ([H^-1]_SS)^-1) of every group, from [g, d, d]."""
    if energies.shape[1] == 1:
        return (energies / inverses)[:, 0, 0]
    lower, _ = torch.linalg.cholesky_ex(inverses)
    return torch.cholesky_solve(energies, lower).diagonal(dim1=1, dim2=2).sum(1)
