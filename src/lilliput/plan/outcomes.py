"""What each linear of a resolved recipe becomes in the file."""

from __future__ import annotations

from lilliput.anatomy.tables import EMBED
from lilliput.export.outcome import Outcome
from lilliput.model.stored import Model
from lilliput.plan.resolve import OUTSIDE, Resolved


def outcomes_of(model: Model, resolved: Resolved) -> dict[str, Outcome]:
    """What each linear becomes, by canonical name."""
    stacks = resolved.stacks()
    return {
        x.name: Outcome(
            name=x.name,
            stored=model.stored_name(f"{x.name}.weight").removesuffix(".weight"),
            out_features=x.linear.out_features,
            in_features=x.linear.in_features,
            scheme=x.scheme,
            dtype=x.dtype,
            sparsity=x.sparsity,
            pattern=x.pattern,
            kept=x.kept,
            places=x.places,
            transposed=x.linear.transposed,
            expert=x.linear.expert is not None,
            router=x.linear.role == "router",
            table=x.block == OUTSIDE,
            embedding=x.linear.role == EMBED,
            also=x.linear.also,
            stack=stacks.get(x.name, ""),
        )
        for x in resolved.planned
    }
