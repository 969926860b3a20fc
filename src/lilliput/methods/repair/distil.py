"""Block-wise distillation: an edited block learns to give what the unedited model has after it.

All weights W of the block's linears are trained by Adam on the mean squared difference between its outputs, for the
inputs that the edited blocks before it give, and the hidden states of the unedited model after the same block and after
all that left behind it. So a block takes over the work of those that were dropped after it, and makes up for the errors
that have gathered before it. One block at a time, forward and back, from the first to the last.

Paper: layer-wise distillation after Sanh et al. 2019, arXiv 1910.01108, and Muralidharan et al. 2024, arXiv 2407.14679,
with the teacher streamed.
Cost: `iters` times a forward and backward pass of `batch` samples through every block. Limits: it fits the calibration
text; norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from lilliput.training import dense
from lilliput.training.descent import DescentOptions, looks
from lilliput.verbs.repair import Repair, RepairIO
from lilliput.verbs.view import FitBlock


class Options(DescentOptions):
    """`lr` defaults to 0.003 of a matrix's root mean square."""

    iters: int = Field(60, ge=0, description="steps of descent; 0 leaves the start unchanged")
    batch: int = Field(4, ge=1, description="samples in a step")


def repair(block: FitBlock, io: RepairIO, o: Options) -> Mapping[str, Tensor]:
    """All weights of the block, trained together."""
    weights, _, _ = dense.descend(block, io.fit, {name: x.weight for name, x in block.layers.items()}, {}, o)
    return weights


METHOD = Repair(
    paper="Muralidharan et al. 2024, arXiv 2407.14679",
    options=Options,
    needs=(),
    covers={},
    recipe=[{"method": "drop-layers"}, {"method": "distil"}],
    run=repair,
    copies=8,  # the weights, what is trained, its gradient, Adam's two, two states to return to, a cast copy
    looks=looks,
)
