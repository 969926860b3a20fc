"""Experts leave that a router uses least: fewer experts in every block, with their rows of the router.

With G_i(x) the weight that a token x gives to the output E_i(x) of expert i, 0 where it did not choose it, an expert's
score is a mean over all calibration tokens: P(G_i > 0), the share of the tokens ("share"); E G_i, the mean weight
("gate"); or E |G_i E_i(x)|, the norm of what it adds to the residual stream ("output"). In every block the `experts`
with the highest scores stay, as many everywhere, because engines read one config for all blocks. The router loses the
rows of those that leave, which is the same as logits of -inf for them: tokens go to the next best of those that stay,
and weights add up as before. Where fewer stay than each token used, it uses all of them.

With text of one task and one expert left in each block this is the pruning of experts for a task; `distil` after this
step takes the place of the fine-tuning between removals.

Paper: Kim et al. 2021, arXiv 2109.10465 (share); one task: Chen et al. 2022, arXiv 2206.00277; outputs: Lasby et al.
2025, arXiv 2510.13999, who take the mean over the tokens of each expert alone.
Cost: one forward pass. Limits: what experts knew that the text does not need is lost; routers that choose within groups
(DeepSeek V3) are refused, and so are experts that are not separate matrices of gate, up and down.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Fewer, fewer

_READ = {"share": "chosen", "gate": "gates", "output": "norms"}


class Options(Fewer):
    """See the module's docstring."""

    by: Literal["share", "gate", "output"] = Field(
        "output", description="share: tokens that chose an expert; gate: its mean weight; output: norm of what it adds"
    )


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """How much each expert of the block is used; nothing for a block without experts."""
    return {} if io.routing is None else {"experts": tuple(io.routing.means(_READ[o.by]).tolist())}


METHOD = Edit(
    paper="Kim et al. 2021, arXiv 2109.10465; Lasby et al. 2025, arXiv 2510.13999",
    options=Options,
    needs=(),
    covers={
        "expert-pruning": [{"method": "expert-pruning"}],
        "task-expert-pruning": [{"method": "expert-pruning", "options": {"experts": 1}}, {"method": "distil"}],
    },
    sizes=fewer,
    score=score,
    routed=lambda o: True,
)
