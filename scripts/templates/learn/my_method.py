"""replace: one line that says what my-method does. Now: reflect the residual stream at a random plane.

replace: the equations. R = I - 2 v vT with a random v of length 1; readers W <- W R, writers W <- RT W.

Paper: replace: authors, year, arXiv number. Cost: no data. Limits: RMS norms without post-norms only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from lilliput.folds.kinds import ResidualRotation
from lilliput.streaming.backward import Samples
from lilliput.target import Strict, Target
from lilliput.verbs.learn import Learn

if TYPE_CHECKING:
    from lilliput.model.rotated import RotatedModel  # which imports transformers


class Options(Strict):
    """replace: your options, each with a default and a description."""

    seed: int = Field(0, ge=0, description="seed of the plane")


def learn(
    model: RotatedModel, samples: Samples | None, targets: Mapping[str, Target], o: Options
) -> Sequence[ResidualRotation]:
    """One rotation; `targets` says what later steps make of each linear, by its full name."""
    # replace: from here on
    width = model.skeleton.hidden_size
    v = torch.randn(width, generator=torch.Generator().manual_seed(o.seed), dtype=torch.float64)
    v = v / v.norm()
    return (ResidualRotation(torch.eye(width, dtype=torch.float64) - 2.0 * torch.outer(v, v)),)


METHOD = Learn(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    recipe=[{"method": "my-method"}, {"method": "rtn", "target": {"bits": 4}}],  # replace: what it prepares for
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=learn,
    sequences=None,  # replace: how many of the samples you look at, where you do, such as lambda o, samples: samples
)
