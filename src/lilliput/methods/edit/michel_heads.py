"""Michel heads: heads leave on whose gates the loss depends least; hidden channels likewise.

With a gate xi_h = 1 that multiplies what head h hands to the o projection, and L_n the mean cross-entropy of sample n,
a head's importance is I_h = mean over n of |dL_n / dxi_h|, divided by the norm of the block's importances. The
derivative is the sum over the columns S that read the head of W_o * dL_n/dW_o. A head is a key-value head with its
query group; the gate of a hidden channel stands in front of the down projection.

Paper: Michel et al. 2019, arXiv 1905.10650. There heads leave a few at a time, importances taken anew: give this step
several times, each with a part of the ratio. By default heads alone leave, as in the paper.
Cost: one backward pass of `samples` samples. Limits: to first order, so a head that matters only together with others
looks idle; the division by the norm matters with `uniform: false` alone, where blocks are compared.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, thinned
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    ratio: float = Field(0.25, ge=0.0, lt=1.0, description="share of the heads (of the blocks' weights) that leaves")
    kinds: tuple[Literal["channel", "head"], ...] = Field(
        ("head",), description="what may leave: channel, head or both"
    )
    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The mean over samples of the derivative's size, with norm 1 over the units of a kind."""
    scores: dict[str, tuple[float, ...]] = {}
    for key, slopes in io.gates.items():
        size = slopes.abs().mean(0)
        norm = float(size.norm())
        scores[key] = tuple((size / norm if norm else size).tolist())
    return scores


METHOD = Edit(
    paper="Michel et al. 2019, arXiv 1905.10650",
    options=Options,
    needs=(),
    covers={
        "michel-heads": [{"method": "michel-heads"}],
    },
    sizes=thinned,
    score=score,
    gates=always,
    looked_at=looked_at,
)
