"""Attribution pruning: hidden channels leave to which the text of one task attributes least of its predictions.

With a gate xi_j = 1 in front of the reader of channel j and L_n the mean cross-entropy of sample n, the derivative
-dL_n / dxi_j = sum over tokens of h_j * d log p / dh_j is what the channel adds to the log-probability of the right
tokens, to first order. A channel's score is the sum of that over the samples; heads likewise. Calibrate with text of
the task that is to be kept: channels that add nothing to it, or take from it, leave first.

Paper: Yang et al. 2023 (Findings of EACL), Task-specific Compression for Multi-task Language Models using
Attribution-based Pruning. There h * dp/dh of the right answer's probability; here of its logarithm, which weighs
unlikely tokens alike.
Cost: one backward pass of `samples` samples. Limits: to first order; signs cancel between samples, so that a channel
which helps some tokens as much as it harms others looks idle (`michel-heads` takes sizes).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lilliput.model.edited import Edit as Decision
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Thinning, Units, best_units, thinned


class Options(Thinning):
    """See the module's docstring."""

    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def gates(o: Options) -> bool:
    """They are always read."""
    return True


def looked_at(samples: int, o: Options) -> int:
    """Samples, of so many."""
    return min(samples, o.samples)


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """What each unit adds to the log-probability of the samples."""
    return {key: tuple((-slopes.sum(0)).tolist()) for key, slopes in io.gates.items()}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The units of the largest attribution."""
    return best_units(scores, units, sizes)


METHOD = Edit(
    paper="Yang et al. 2023 (Findings of EACL), Attribution-based Pruning",
    options=Options,
    needs=(),
    covers={
        "attribution-prune": [{"method": "attribution-prune"}],
    },
    sizes=thinned,
    run=run,
    score=score,
    gates=gates,
    looked_at=looked_at,
)
