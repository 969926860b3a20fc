"""Dynamic batch loading: of several texts those come more often whose losses are farther above what they should be.

Each sample of a batch is of domain d with probability w_d. After a number of steps the losses of the domains are
measured, and with those l_ref of a model that is as good as this one should become,

    Delta_d = max(l_d - l_ref,d, 0),   w_d <- w_d exp(Delta_d) / sum over all domains.

Within a domain every row comes once before any comes again. Paper: Xia et al. 2024, arXiv 2310.06694.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lilliput.errors import DataError


def reweighed(weights: Sequence[float], losses: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    """The weights of the domains by their losses and those that they should have; they add up to 1.

    Raises DataError for numbers that are not finite.
    """
    seen = torch.tensor([weights, losses, reference], dtype=torch.float64)
    if not bool(seen.isfinite().all()):
        raise DataError(f"losses of domains are {list(losses)}: texts cannot be weighed by them")
    excess = (seen[1] - seen[2]).clamp(min=0.0)
    new = seen[0] * (excess - excess.max()).exp()
    return tuple((new / new.sum()).tolist())


class Mixture:
    """Rows of several domains, drawn by weights that change. domain: int64 [N], the number of each row's domain.

    Raises DataError for a domain without rows, or weights that are none.
    """

    def __init__(self, domain: Tensor, weights: Sequence[float], seed: int) -> None:
        self._rows = [torch.nonzero(domain == d)[:, 0] for d in range(len(weights))]
        total = sum(weights)
        if min(weights, default=0.0) < 0 or not total > 0:
            raise DataError(f"weights of texts are {list(weights)}: give numbers from 0 on, not all of them 0")
        empty = [d for d, rows in enumerate(self._rows) if not len(rows) and weights[d] > 0]
        if empty:
            raise DataError(f"text {empty[0] + 1} of {len(weights)} has no row to train on: give more of it")
        self.weights = tuple(x / total for x in weights)
        self._taken = [0] * len(weights)
        self._seed = seed

    def batch(self, step: int, size: int) -> list[int]:
        """The rows of the step of that number. Steps are asked for in order, each once."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.multinomial(
            torch.tensor(self.weights, dtype=torch.float64), size, replacement=True, generator=generator
        )
        return [self._next(d) for d in chosen.tolist()]

    def _next(self, d: int) -> int:
        rows = self._rows[d]
        turn, place = divmod(self._taken[d], len(rows))
        self._taken[d] += 1
        generator = torch.Generator().manual_seed((self._seed * 1_009 + d) * 1_000_003 + turn)
        return int(rows[torch.randperm(len(rows), generator=generator)[place]])

    def learn(self, losses: Sequence[float], reference: Sequence[float]) -> None:
        """Weigh the domains anew."""
        self.weights = reweighed(self.weights, losses, reference)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to know."""
        return {
            "weights": torch.tensor(self.weights, dtype=torch.float64),
            "taken": torch.tensor(self._taken, dtype=torch.int64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.weights = tuple(state["weights"].tolist())
        self._taken = state["taken"].tolist()
