"""Inputs as integers: a scale for each token found while the model runs, or static scales from calibration text.

A dynamic scale follows from the inputs at hand: with b bits s_t = max|X_t| / (2^b - 1) * 2 for each token t (for each
group of the target's `group_size` inputs of a token, or with "tensor" for all tokens of a forward pass), asymmetric
(max - min) / (2^b - 1) with a zero point. Nothing is calibrated. `clip` covers a share of the range, which pays off at
4 bits.

A static scale is stored, one for all inputs, for groups of channels, or for each channel (`channels: true`). Its range
covers what the calibration text has shown (`range: minmax`), a share of the inputs (`percentile`), or is that of least
expected squared error (`mse`), or of least Kullback-Leibler divergence between the histograms of inputs before and
after (`kl`); `average` takes the mean over samples of the largest input of each, as a moving average does. All but
minmax and average look at histograms of |x| with two bins for each power of two, and are symmetric.

A linear then computes y_to = s_t s_o sum_j q_tj p_oj, from integers; Lilliput computes the same in floating point
wherever no kernel serves.

zeroquant is a recipe: weights as integers in groups, one scale for each, of 8 bits (4 for the MLP's in the paper), and
inputs of 8 bits by token, all without calibration; embedding, head and norms stay as they are. A fit of the block, such
as signround behind this step, repairs it with the uncompressed block's outputs as the target and inputs rounded; the
paper's distillation of one layer after the other (lkd) trains the weights before they are rounded.

Between the linears everything stays in floating point. What i-bert would do there, exponential, GELU, softmax and norms
on integers alone, is `lilliput.algebra.integers`: the arithmetic, tested against floats, which no model runs through.

Papers: Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018, arXiv 1806.08342 (ranges); Yao et al. 2022, ZeroQuant,
arXiv 2206.01861; Kim et al. 2021, I-BERT, arXiv 2101.01321.
Cost: none (dynamic), or the inputs' extremes or histograms (static).
Limits: a scale for each channel cannot leave the sum over channels, so no integer kernel has it: it shows what the
granularity costs. One dynamic scale for a whole forward pass depends on what is batched together.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.parts.inputs import units
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.layer import Layer
from lilliput.stats import bins, pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs

Range = Literal["minmax", "average", "percentile", "mse", "kl"]


class Options(Strict):
    """`dynamic` false: the scales are calibrated and stored."""

    dynamic: bool = Field(True, description="scales found while the model runs; false: calibrated and stored")
    channels: bool = Field(False, description="a static scale for each channel, whatever group_size says")
    clip: float = Field(1.0, gt=0.0, le=1.0, description="share of a dynamic range that is covered")
    range: Range = Field("minmax", description="how a static range is chosen")
    percentile: float = Field(99.99, gt=50.0, le=100.0, description="of |x|, for range percentile")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    if o.dynamic and o.range != "minmax":
        raise PlanError(f"range {o.range} looks at calibration text: set dynamic: false, or leave range out")
    if not o.dynamic and o.range not in ("minmax", "average") and not target.symmetric:
        raise PlanError(f"range {o.range} is symmetric: leave out symmetric: false, or take range minmax")
    if not o.dynamic and o.clip != 1.0:
        raise PlanError("clip is for dynamic ranges: a static one is chosen by range")
    unit, size = units.of(target, o.dynamic)
    if o.channels:
        unit, size = "channel", 0
    return UniformInput(target.bits or 8, unit, size, target.symmetric, o.dynamic, o.clip)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs, with its scales where they are static."""
    form = spec(target, o, stats.width)
    if not isinstance(form, UniformInput) or o.dynamic:
        return InputGrid(form)
    count = units.count(form.granularity, form.group_size, stats.width)
    if o.range in ("minmax", "average"):
        low, high = pooled.extremes(stats, count, o.range)
    else:
        high = _top(pooled.counts(stats.need("histogram"), count), pooled.largest(stats, count), form, o)
        low = -high
    scale, zero = form.parameters(low, high)
    tensors = {SCALE: scale.cpu().float()}
    return InputGrid(form, tensors if zero is None else tensors | {ZERO: zero.cpu().to(torch.int32)})


def _top(counts: Tensor, largest: Tensor, form: UniformInput, o: Options) -> Tensor:
    """The largest |x| that is covered, float32 [n], from histograms [n, bins] and the largest of all."""
    edges = bins.edges(counts.device)  # [bins + 1]
    if o.range == "percentile":
        share = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1.0)
        place = (share < o.percentile / 100).sum(1).clamp(max=counts.shape[1] - 1)
        return torch.minimum(edges[place + 1].float(), largest)
    candidates = torch.minimum(edges[1:].expand(len(counts), -1).float(), largest[:, None])  # [n, k]
    score = _squared(counts, candidates, edges, form.bits) if o.range == "mse" else _kl(counts, form.bits)
    return candidates.gather(1, score.argmin(1, keepdim=True))[:, 0]


def _squared(counts: Tensor, tops: Tensor, edges: Tensor, bits: int) -> Tensor:
    """Expected squared error [n, k] of covering up to `tops` [n, k]: a step's variance for what is covered (at most
    that of rounding to 0), and the distance to the top for what is beyond."""
    middle = ((edges[1:] + edges[:-1]) / 2).expand(counts.shape[0], -1)
    step = tops.double() * 2 / ((1 << bits) - 1)
    error = torch.zeros_like(step)
    for b in range(counts.shape[1]):
        x = middle[:, b : b + 1]
        inside = torch.minimum(step.square() / 12, x.square())
        error += counts[:, b : b + 1] * torch.where(x <= tops, inside, (x - tops).square())
    return error


def _kl(counts: Tensor, bits: int) -> Tensor:
    """KL divergence [n, bins] of the histogram from what is left of it when bins beyond each top join the last one, and
    bins below half a step are 0."""
    total = counts.sum(1, keepdim=True).clamp(min=1.0)
    score = torch.full_like(counts, torch.inf)
    finest = 2 * bits - 2  # two bins an octave: what lies below the top by this many bins is under half a step
    for top in range(counts.shape[1]):
        kept = counts.clone()
        kept[:, top] += counts[:, top + 1 :].sum(1)
        kept[:, top + 1 :] = 0
        first = max(0, top - finest)
        kept[:, first] += kept[:, :first].sum(1)
        kept[:, :first] = 0
        p, q = counts / total, (kept + 1e-9 * total) / (total * (1 + 1e-9 * counts.shape[1]))
        score[:, top] = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(1)
    return score


def reads(o: Options) -> tuple[str, ...]:
    """What static ranges look at."""
    if o.dynamic:
        return ()
    return {"minmax": ("low", "high"), "average": ("extremes",)}.get(o.range, ("absmax", "histogram"))


METHOD = Inputs(
    paper="Jacob et al. 2018, arXiv 1712.05877",
    options=Options,
    needs=("low", "high", "extremes", "absmax", "histogram"),
    reads=reads,
    formats=("int",),
    covers={
        "act-static-dynamic": [
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "act-static-dynamic"},
        ],
        "zeroquant": [
            {"method": "rtn", "target": {"bits": 8}, "options": {"search": "minmax"}},
            {"method": "act-static-dynamic"},
        ],
        "i-bert": "its arithmetic is lilliput.algebra.integers; no model runs softmax, norms and GELU through it",
    },
    run=inputs,
    spec=spec,
)
