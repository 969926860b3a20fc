"""Magnitude pruning: removes the smallest weights, data free.

Score |W_ij|; the lowest are removed within the whole layer, within each row, or all but N of every M consecutive
inputs.

The terms of pruning (`mask-formalism`), and where each is decided here. The model computes with M * W, M a mask of 0
and 1, the layer's support. A score says what a weight is worth: its size here, its size times that of its input in
`wanda`. A scope says which weights compete: `scope` and target.pattern. A share says how many are removed:
round(sparsity * n) of the n weights of a scope, exactly; of equal scores the earlier weight stays; 0 leaves the layer
as it is and 1 leaves nothing of it. The unit is a single weight, or with `block` [r, c] the weights of r rows and c
inputs, which all stay or all leave, by their group norm

    |W_b| = (sum over the block's weights of w^2)^(1/2)

and round(sparsity * n) of the n blocks of a scope leave; heads and neurons are not removed here. All of it
is post-training, in one shot and local: each layer for itself, where `owl` in front divides one share between layers.
Both scores need no gradients; this one needs no data. The remaining weights are updated, if at all, by a later step
that respects the support, such as `gptq`; nothing here prunes during training, or in several rounds.

Paper: Han et al. 2015, arXiv 1506.02626; N:M: Mishra et al. 2021, arXiv 2104.08378; blocks: Narang et al. 2017, arXiv
1711.02782.
Cost: one selection per scope. Limits: weak on language models, whose inputs differ a thousandfold in size.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator

from lilliput.algebra import masks
from lilliput.errors import PlanError
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["layer", "row"] = Field("layer", description="weights (or blocks) that are compared with each other")
    block: tuple[int, int] = Field((1, 1), description="rows and inputs of the blocks that stay or leave as a whole")

    @field_validator("block")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("a block has at least one row and one input, such as [16, 16]")
        return value


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity, or blocks do not fit."""
    score = layer.rest().abs()
    if o.block == (1, 1):
        return layer.with_support(masks.choose(score, target.sparsity, target.pattern, o.scope))
    (rows, width), (high, wide) = score.shape, o.block
    down, across = _blocks(target, o, rows, width)
    norms = score.view(down, high, across, wide).square().sum((1, 3), dtype=torch.float64).sqrt()
    stays = masks.choose(norms, target.sparsity, None, o.scope)
    return layer.with_support(stays.repeat_interleave(high, 0).repeat_interleave(wide, 1))


def _blocks(target: Target, o: Options, rows: int, width: int) -> tuple[int, int]:
    """How many blocks a [rows, width] matrix has down and across. Raises PlanError where they do not fit."""
    high, wide = o.block
    if target.pattern is not None:
        raise PlanError(f"the pattern {target.pattern} is of single weights: give a sparsity, or leave block at [1, 1]")
    if rows % high or width % wide:
        raise PlanError(f"blocks of {high} x {wide} do not divide a matrix of {rows} x {width}: leave this layer out")
    return rows // high, width // wide


def kept(target: Target, o: Options, rows: int, width: int) -> int:
    """How many weights of a [rows, width] matrix stay. Raises PlanError as `compress` does."""
    if o.block == (1, 1):
        return scope.kept(target, o, rows, width)
    down, across = _blocks(target, o, rows, width)
    return scope.kept(target, o, down, across) * o.block[0] * o.block[1]


METHOD = Compress(
    paper="Han et al. 2015, arXiv 1506.02626",
    options=Options,
    needs=(),
    writes="support",
    covers={
        "magnitude": [{"method": "magnitude", "target": {"sparsity": 0.5}}],
        "nm-sparsity": [{"method": "magnitude", "target": {"pattern": "2:4"}}],
        "block-structured": [
            {"method": "magnitude", "target": {"sparsity": 0.5}, "options": {"block": [16, 16]}},
        ],
        "flash-llm": [{"method": "magnitude", "target": {"sparsity": 0.97, "places": "tiles"}}],
        "mask-formalism": None,
    },
    run=compress,
    kept=kept,
)
