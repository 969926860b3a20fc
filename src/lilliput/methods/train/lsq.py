"""LSQ: weights under straight-through rounding, with the steps of their grid learned too.

A weight w with the step S of its unit is what its code says, and gradients pass the rounding as if it were not there:

    What = S (clip(round(w / S) + Z, lowest, highest) - Z)
    dL/dw = g inside the window of codes, 0 outside
    dL/dS = sum g (code - Z - w / S) inside, sum g (code - Z) outside,

times 1 / sqrt(N highest) for N weights of a step (`scaled`). Zero points stay, or move with `zeros`: dL/dZ = -sum g S
outside. `grid` kept leaves the steps alone (STE); anew takes, at every use, those that the latent weights would be
given without a search: their range, or for ternary codes the threshold 0.7 mean |w| and S = mean |w| over what is
above it (TWN, as TernaryBERT trains; BitDistiller's clipped grids, as latent weights begin inside the window).

LLM-QAT is that of integers, one step for each output, over the whole range, where inputs and the cache are rounded too
(`act-static-dynamic` and `kv-rtn` before this step), on text that the teacher writes (`data` self, `greedy` 3 to 5).

Codes of any grid with steps are trained: levels pass gradients between the outermost; binary coding always, its alphas
by dL/dalpha_i = sum g b_i.

Papers: Esser et al. 2020, arXiv 1902.08153; Bengio et al. 2013, arXiv 1308.3432; TernaryBERT: Zhang et al. 2020, arXiv
2009.12812; BitDistiller: Du et al. 2024, arXiv 2402.10631; LLM-QAT: Liu et al. 2023, arXiv 2305.17888. Cost: a latent
weight, its gradient and two moments in float32. Limits: codes of vectors and trellises have no steps; what was pruned
stays 0, and so do weights that were kept and have code 0, as the folder does not tell them apart.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from lilliput.formats import rounding
from lilliput.formats.binary import BinaryFormat
from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.ternary import TernaryFormat
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme
from lilliput.training import coded, grids
from lilliput.training.coded import Coded, CodedOptions
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained

FORMATS = (IntegerFormat, GgmlFormat, LevelFormat, TernaryFormat, BinaryFormat)


class Options(CodedOptions):
    """See the module's docstring."""

    grid: Literal["learned", "kept", "anew"] = Field(
        "learned", description="steps of the grid: learned with the weights, kept (STE), or taken anew at each use"
    )
    zeros: bool = Field(False, description="learn the zero points too")
    scaled: bool = Field(True, description="gradients of steps times 1 / sqrt(N highest)")


class Rounded(Coded):
    """Latent weights float32 [out, in], and shares by which the steps of their grid move."""

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        moving = () if o.grid != "learned" else ("scale", "zero") if o.zeros else ("scale", "alpha", "offset")
        super().__init__(layer, moving, scaled=o.scaled)
        self._anew = o.grid == "anew"
        latent = self.latent_start(original, o)
        if self._anew:
            part = layer.parts[self.at]
            if isinstance(part, QuantizedPart) and isinstance(self.form, IntegerFormat):
                scale, zero = self.form.opened(part.grid)
                spread = grids.Shares(latent.shape[1], self.form.group_size).spread
                ends = [spread(scale * (end - zero)) for end in (self.form.lowest, self.form.highest)]
                latent = latent.clamp(ends[0].minimum(ends[1]), ends[0].maximum(ends[1]))
        self.latent = nn.Parameter(latent)

    def present(self) -> tuple[dict[str, Tensor], Tensor]:
        """The numbers of the grid, and what is encoded."""
        latent = self.supported(self.latent)
        if not self._anew:
            return self.numbers(), latent
        grid, encoded = self.tuned.anew(latent.detach())
        return dict(self.tuned.opened(grid)), rounding.through(latent, encoded)

    def value(self) -> Tensor:
        numbers, latent = self.present()
        return grids.meant(self.tuned, numbers, latent=latent)

    def codes(self) -> tuple[Tensor, Any]:
        numbers, latent = self.present()
        grid = self.tuned.closed(numbers)
        return self.form.encode(latent, grid), grid


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The last codes of the layer."""
    return Rounded(layer, original, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Codes of a grid with steps, whose zero points are there if they are to be learned."""
    reason = coded.refused(scheme, FORMATS)
    if reason is not None:
        return reason
    form = coded.format_of(scheme)
    if o.zeros and (not isinstance(form, IntegerFormat | GgmlFormat) or form.symmetric):
        return f"{form.describe()} has no zero points to learn: leave out `zeros`, or quantize with symmetric: false"
    if o.zeros and o.grid != "learned":
        return f"with grid '{o.grid}' zero points are not learned: leave out `zeros`"
    if o.grid == "anew" and not isinstance(form, IntegerFormat | TernaryFormat):
        return f"grid 'anew' is for integers and ternary codes, and it has {form.describe()}: choose learned or kept"
    return coded.zeroless(scheme, o)


METHOD = Train(
    paper="Esser et al. 2020, arXiv 1902.08153; Bengio et al. 2013, arXiv 1308.3432",
    options=Options,
    covers={
        "ste": [
            {"method": "rtn", "target": {"bits": 4}},
            {"method": "lsq", "options": {"grid": "kept", "start": "original"}},
        ],
        "llm-qat": [
            {"method": "rtn", "target": {"bits": 4, "group_size": "channel"}, "options": {"search": "minmax"}},
            {"method": "act-static-dynamic", "target": {"bits": 8}},
            {"method": "kv-rtn", "target": {"bits": 4, "group_size": "channel"}},
            {
                "method": "lsq",
                "options": {"grid": "anew", "start": "original", "data": "self", "greedy": [3, 5], "lr": 2e-5},
            },
        ],
        "gpu-sparse-quant": [
            {"method": "wanda", "target": {"pattern": "2:4"}},
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "lsq", "options": {"start": "original"}},
        ],
        "ternarybert": [
            {"method": "ternary", "target": {"format": "ternary"}},
            {"method": "lsq", "options": {"grid": "anew", "start": "original"}},
        ],
    },
    recipe=[{"method": "rtn", "target": {"bits": 4}}, {"method": "lsq"}],
    begin=begin,
    admits=admits,
    restarts=coded.restarts,
)
