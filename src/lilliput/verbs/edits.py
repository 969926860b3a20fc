"""What an edit of the model's structure returns: groups that leave, and the bases in which blocks see the residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lilliput.anatomy.model import Group


@dataclass(frozen=True)
class EditPlan:
    """removed: groups that leave, by block. bases: one matrix with orthonormal columns [hidden, kept], float64, for
    every block and one for the final norm and head; empty where the residual stream keeps its basis.

    In block i readers W <- W Q_i and writers W <- Q_iT W; the embedding E <- E Q_0, the head W <- W Q_last; between
    blocks the residual stream is multiplied by `transition(i)`.
    """

    removed: Mapping[int, tuple[Group, ...]] = field(default_factory=dict)
    bases: tuple[Tensor, ...] = ()

    def transition(self, block: int) -> Tensor:
        """The skip connection's transform after `block`: Q_iT Q_(i+1), float64 [kept_i, kept_(i+1)]."""
        return self.bases[block].T @ self.bases[block + 1]
