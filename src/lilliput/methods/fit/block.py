"""Block-wise distillation of a pruned block: the weights that were kept learn to give what the whole block gave.

After a step that prunes, all kept weights of the block's linears are trained together by Adam on the mean squared
difference between its outputs and those of the block before it was pruned, on the inputs that the blocks before it now
give. Zeros stay zeros; the best state is kept, and it is never worse than the start on the calibration text.

Paper: block-wise reconstruction after Li et al. 2021, arXiv 2102.05426, for masks as in Kwon et al. 2022,
arXiv 2204.09656.
Cost: `iters` times a forward and backward pass of `batch` samples through the block. Limits: it fits the calibration
text; norms and biases stay as they are. Edited blocks are trained by `distil`, before anything else happens to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field

from lilliput.target import Target
from lilliput.training import dense
from lilliput.training.descent import DescentOptions, looks
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO


class Options(DescentOptions):
    """`lr` defaults to 0.003 of a matrix's root mean square."""

    iters: int = Field(60, ge=0, description="steps of descent; 0 leaves the start unchanged")
    batch: int = Field(4, ge=1, description="samples in a step")


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """The layers with other values of the weights that they keep. Raises LilliputError for one that is not pruned."""
    masks = {name: layer.need_support() for name, layer in block.layers.items()}
    start = {name: layer.decode() for name, layer in block.layers.items()}
    weights, first, last = dense.descend(block, io, start, masks, o)
    layers = {name: replace(layer, updated=weights[name]) for name, layer in block.layers.items()}
    return BlockFit(layers, first, last)


METHOD = Fit(
    paper="Li et al. 2021, arXiv 2102.05426; Kwon et al. 2022, arXiv 2204.09656",
    options=Options,
    needs=("square",),
    writes="support",
    recipe=[{"method": "sparsegpt"}, {"method": "block"}],
    covers={},
    run=fit,
    copies=9,  # the weights, what is trained, its gradient, Adam's two, two states to return to, masks, a cast copy
    looks=looks,
)
