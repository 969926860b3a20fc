"""Random Hadamard rotation: the residual stream is turned so that no channel stands out; the function stays.

R = diag(s) H / sqrt(n) with random signs s; norm gains move into the readers, then readers W <- W R, writers W <- RT W,
embedding E <- E R, head W <- W R. A tied head is untied: the final norm's gain goes into it alone.

Paper: Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456; the rotation of the residual stream only, folded into the
weights.
Cost: no data; one product with an n x n matrix per tensor while it is read. Limits: RMS norms without post-norms only;
the width has to be a power of two times factors of 12 and 20, otherwise a random orthogonal matrix serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lilliput.algebra import hadamard
from lilliput.algebra.rotations import orthogonal
from lilliput.errors import PlanError
from lilliput.folds.kinds import ResidualRotation
from lilliput.streaming.backward import Samples
from lilliput.target import Strict, Target
from lilliput.verbs.learn import Learn
from lilliput.verbs.spec import Around

if TYPE_CHECKING:
    from lilliput.model.rotated import RotatedModel  # which imports transformers


class Options(Strict):
    """`kind`: a Hadamard matrix spreads a single channel evenly; any width has a random orthogonal matrix."""

    kind: Literal["hadamard", "orthogonal"] = Field("hadamard", description="family of the random rotation")
    seed: int = Field(0, ge=0, description="seed of the signs, or of the matrix")


def refuse(around: Around, o: Options) -> str | None:
    """Why this width has no such rotation."""
    try:
        if o.kind == "hadamard":
            hadamard.factor(around.width)
    except PlanError as error:
        return f"{error} (hadamard.kind=orthogonal)"
    return None


def learn(
    model: RotatedModel, samples: Samples | None, targets: Mapping[str, Target], o: Options
) -> Sequence[ResidualRotation]:
    """One rotation; neither weights nor samples are looked at."""
    width = model.skeleton.hidden_size
    return (ResidualRotation(hadamard.matrix(width, o.seed) if o.kind == "hadamard" else orthogonal(width, o.seed)),)


METHOD = Learn(
    paper="Ashkboos et al. 2024, arXiv 2404.00456",
    options=Options,
    needs=(),
    covers={},
    run=learn,
    refuse=refuse,
)
