"""Each token goes through fewer experts: the config's number of experts per token is lowered, no weight changes.

A router gives a token's k chosen experts the weights g_1 >= g_2 >= .. >= g_k. With `top_k` = m of them left, the token
uses the first m, and a router that makes its weights sum to one goes on doing so. What is given up is measured: the
mean over calibration tokens and blocks of (g_1 + .. + g_m) / (g_1 + .. + g_k), whose terms by block are in the journal;
where it is below `keep`, the run ends before anything is written.

Paper: none; the weights are those of Shazeer et al. 2017, arXiv 1701.06538.
Cost: one forward pass. Limits: the folder is as large as before, each token reads fewer weights; models that were
trained with a fixed number of experts per token lose quality quickly, above all from 2 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lilliput.errors import LilliputError, PlanError
from lilliput.model.edit import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Units, experts_in


class Options(Strict):
    """See the module's docstring."""

    top_k: int = Field(1, ge=1, description="experts that each token uses")
    keep: float = Field(0.0, ge=0.0, le=1.0, description="least share of the routers' weights that has to stay")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError for a model without experts, or whose tokens use no more than `top_k`."""
    experts_in(units)
    before = max(x.top_k for x in units)
    if o.top_k > before > 0:
        raise PlanError(f"top_k: each token uses {before} experts of a block, which {o.top_k} would raise: give less")
    return Sizes(len(units), top_k=o.top_k)


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The mean share of a token's largest weight, of the second, and so on; nothing for a block without experts."""
    return {} if io.routing is None else {"gates": tuple(io.routing.means("ranked").tolist())}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """All experts, fewer for each token. Raises LilliputError where less than `keep` of the weights would stay."""
    kept = mass(scores, o.top_k)
    if kept < o.keep:
        raise LilliputError(
            f"{kept:.3f} of the routers' weights stay with {o.top_k} experts for each token, less than keep = "
            f"{o.keep}: give a larger top_k or a smaller keep"
        )
    return Decision(tuple(range(len(units))), top_k=sizes.top_k)


def mass(scores: Sequence[EditScores], top_k: int) -> float:
    """The mean over blocks with experts of the share of the weights that stays."""
    shares = torch.tensor([sum(x["gates"][:top_k]) for x in scores if "gates" in x], dtype=torch.float64)
    if bool(torch.isnan(shares).any()):
        raise LilliputError("scores of an edit contain NaN: check the weights and the calibration data")
    return float(shares.mean()) if len(shares) else 1.0


METHOD = Edit(
    paper="Shazeer et al. 2017, arXiv 1701.06538",
    options=Options,
    needs=(),
    covers={},
    sizes=sizes,
    run=run,
    score=score,
    routed=lambda o: True,
)
