"""Token pruning: of a prompt, only the tokens that attract attention go through the later layers.

At each layer of `layers`, with n tokens of the prompt left, H heads and attention weights A of these tokens,

    a_j = 1 / (H n) sum over heads h and queries i of A_hij,

and the ceil(keep * n) tokens with the largest a_j go on, in their order and with their positions; the prompt's last
token always does. The others take no part in any later layer, which keeps no keys and values of them either. Tokens
that follow the prompt are never pruned. Of equal importances the earlier tokens stay.

Paper: attention received as importance in Goyal et al. 2020 (PoWER-BERT), arXiv 2001.08950; Wang et al. 2021 (SpAtten),
arXiv 2012.09852.
Cost: nothing is fitted. At a pruning layer, the prompt's attention once more, a few queries at a time. Limits: earlier
tokens are seen by more queries, so a causal model favours them. Prompts of one batch must have one length, without
padding; layers of full attention alone, run by 'sdpa' or 'eager', and caches that grow. Logits at pruned positions say
nothing. A prompt that is read in several pieces is pruned in its first piece alone.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lilliput.anatomy.model import Anatomy
from lilliput.errors import PlanError
from lilliput.runtime.behaviours.state import TOKENS
from lilliput.target import Strict
from lilliput.verbs.behave import Behave


class Options(Strict):
    """See the module's docstring."""

    layers: tuple[int, ...] = Field(
        (), description="blocks after which tokens leave, counted from 0; none: the one after a quarter of the blocks"
    )
    keep: float = Field(0.5, gt=0.0, le=1.0, description="share of the prompt's remaining tokens that goes on")


def entry(anatomy: Anatomy, o: Options) -> dict[str, Any]:
    """The config's entry."""
    count = len(anatomy.blocks)
    layers = sorted(set(o.layers)) or [max(0, count // 4 - 1)]
    wrong = [x for x in layers if not 0 <= x < count - 1]
    if wrong:
        raise PlanError(
            f"after block {wrong[0]} of {anatomy.architecture} no block is left to skip, or there is no such block: "
            f"give layers from 0 to {count - 2}"
        )
    if any(x.expert is not None for block in anatomy.blocks for x in block.linears):
        raise PlanError(f"the work of experts in {anatomy.architecture} cannot be counted: leave the step out")
    return {"kind": TOKENS, "blocks": list(anatomy.block_names), "layers": layers, "keep": o.keep}


METHOD = Behave(
    paper="Goyal et al. 2020, arXiv 2001.08950; Wang et al. 2021, arXiv 2012.09852",
    options=Options,
    needs=(),
    covers={"token-pruning": [{"method": "token-pruning"}]},
    entry=entry,
    note="Of a prompt only some tokens go through the later layers: see docs/dynamic.md for what that excludes.",
)
