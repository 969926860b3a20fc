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

from pydantic import Field

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, thinned
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """What each unit adds to the log-probability of the samples."""
    return {key: tuple((-slopes.sum(0)).tolist()) for key, slopes in io.gates.items()}


METHOD = Edit(
    paper="Yang et al. 2023 (Findings of EACL), Attribution-based Pruning",
    options=Options,
    needs=(),
    covers={
        "attribution-prune": [{"method": "attribution-prune"}],
    },
    sizes=thinned,
    score=score,
    gates=always,
    looked_at=looked_at,
)
