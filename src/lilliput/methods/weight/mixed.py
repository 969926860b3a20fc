"""Mixed: GPTQ where the grid lets it, QuIP where the grid wants the weight turned first, SparseGPT where it has zeros.

Codes that run along whole columns (trellis codes) come close to what theory allows for a Gaussian, which a weight is
between random rotations and not as it is; grids with groups of scales follow a weight as it is, and rotations would
take from them what they follow. So the grid decides: "trellis" and "trellis-half" are put in by `quip` between
rotations, without a diagonal scale, every other grid by `gptq`, after `sparsegpt` where the target has a pattern. A
step that gives each linear a grid of its own (`menu`) can so set all side by side in one model; see `gptq`, `quip` and
`sparsegpt` for the equations.

Paper: Frantar et al. 2023, arXiv 2210.17323; Chee et al. 2023, arXiv 2307.13304; Tseng et al. 2024, arXiv 2406.11235;
Frantar and Alistarh 2023, arXiv 2301.00774.
Cost: that of `gptq` or of `quip` with `refine` passes. Limits: those of the two; an embedding or a head takes no turned
grid.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.budget import menu
from lilliput.formats import swept
from lilliput.methods.weight import gptq, quip, sparsegpt
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of it")
    refine: int = Field(1, ge=0, le=50, description="passes of coordinate descent over turned codes")
    refine_plain: int = Field(0, ge=0, le=50, description="the same over the codes of other grids")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes, between rotations where the format wants them. Raises PlanError for a format that neither method has."""
    if menu.turned(target):
        return quip.scheme(target, _turning(o), rows, width)
    return gptq.scheme(target, _plain(o), rows, width)


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with codes for what its parts leave over. Raises PlanError for a mask under rotations."""
    if menu.turned(target):
        return quip.compress(layer, stats, target, _turning(o))
    if menu.pruned(target):
        layer = sparsegpt.compress(layer, stats, target, sparsegpt.Options(damping=o.damping, shrinkage=o.shrinkage))
    return gptq.compress(layer, stats, target, _plain(o))


def _turning(o: Options) -> quip.Options:
    return quip.Options(diagonal=False, damping=o.damping, shrinkage=o.shrinkage, refine=o.refine)


def _plain(o: Options) -> gptq.Options:
    return gptq.Options(damping=o.damping, shrinkage=o.shrinkage, refine=o.refine_plain)


METHOD = Compress(
    paper="Frantar et al. 2023, arXiv 2210.17323; Tseng et al. 2024, arXiv 2406.11235",
    options=Options,
    needs=("gram",),
    writes="quantized",
    formats=(*swept.NAMES, "trellis", "trellis-half"),
    baseline="rtn",
    covers={},
    run=compress,
    scheme=scheme,
    rowwise=True,
    mixes=lambda target, o: menu.turned(target),
    sweeps=lambda o: 1 + o.refine,
    prunes=True,
)
