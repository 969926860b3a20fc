"""What an edit keeps of a model, as plain data that the journal holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lilliput.anatomy.model import Block, Group

BRANCHES = {"attention": ("o",), "mlp": ("down",)}
"""What adds to the residual stream, with the roles of the linears by which it does."""

Shares = tuple[tuple[int, float], ...]
"""Experts that become one, each with its share of the average."""


@dataclass(frozen=True)
class Edit:
    """What stays of a model, in the numbers of the model that is edited.

    blocks: blocks, in order. channels: by block and by number among its MLPs (experts have one each), hidden channels.
    heads: by block, heads with their query groups. hidden: of a model that is turned, the first so many channels of the
    residual stream (None: all), or those that `residual` names. spread: the decision may divide channels and heads
    between blocks otherwise, at as many weights in all. experts: by block, experts with their rows of the router.
    merged: by block, for each of these experts the experts whose weights it averages. top_k: experts that each token
    uses (None: as many as before, or all where fewer stay). vocabulary: token ids that stay, ascending (None: all).
    silent: by block, branches of `BRANCHES` that write nothing any more. What is not named stays whole.
    """

    blocks: tuple[int, ...]
    channels: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    hidden: int | None = None
    spread: bool = False
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    merged: Mapping[int, tuple[Shares, ...]] = field(default_factory=dict)
    top_k: int | None = None
    vocabulary: tuple[int, ...] | None = None
    silent: tuple[tuple[int, str], ...] = ()
    residual: tuple[int, ...] | None = None

    def plain(self) -> dict[str, Any]:
        """For a record of the journal."""
        return {
            "blocks": list(self.blocks),
            "channels": [[*place, list(kept)] for place, kept in self.channels.items()],
            "heads": [[block, list(kept)] for block, kept in self.heads.items()],
            "hidden": self.hidden,
            "spread": self.spread,
            "experts": [[block, list(kept)] for block, kept in self.experts.items()],
            "merged": [
                [block, [[list(x) for x in group] for group in groups]] for block, groups in self.merged.items()
            ],
            "top_k": self.top_k,
            "vocabulary": None if self.vocabulary is None else list(self.vocabulary),
            "silent": [list(x) for x in self.silent],
            "residual": None if self.residual is None else list(self.residual),
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Edit:
        """Undo `plain`."""
        return Edit(
            tuple(plain["blocks"]),
            {(int(b), int(n)): tuple(kept) for b, n, kept in plain["channels"]},
            {int(b): tuple(kept) for b, kept in plain["heads"]},
            plain["hidden"],
            bool(plain["spread"]),
            {int(b): tuple(kept) for b, kept in plain["experts"]},
            {
                int(b): tuple(tuple((int(e), float(share)) for e, share in group) for group in groups)
                for b, groups in plain["merged"]
            },
            plain["top_k"],
            None if plain.get("vocabulary") is None else tuple(plain["vocabulary"]),
            tuple((int(block), str(branch)) for block, branch in plain["silent"]),
            None if plain.get("residual") is None else tuple(plain["residual"]),
        )


def heads_of(block: Block) -> list[Group]:
    """The heads of a block, each with its query group."""
    return [x for x in block.groups.listed if x.kind == "head"]


def writers_of(block: Block, branch: str) -> list[str]:
    """The linears by which a branch of a block writes to the residual stream."""
    return [x.name for x in block.linears if x.role in BRANCHES[branch]]


def router_of(block: Block) -> str | None:
    """The router whose rows are the experts of a block; None where there is none, or several."""
    routers = {x.members[0][0] for x in block.groups.listed if x.kind == "expert"}
    return next(iter(routers)) if len(routers) == 1 else None


def experts_of(block: Block) -> list[Group]:
    """The experts of a block, in the order of their router's rows; none where no one router chooses among them."""
    return [x for x in block.groups.listed if x.kind == "expert"] if router_of(block) is not None else []


def bank_of(block: Block) -> str | None:
    """The module that holds the experts of a block: "mlp.experts"."""
    for group in experts_of(block)[:1]:
        for name, _, _ in group.members[1:]:
            return name.partition(f".{block.linear(name).expert}.")[0]
    return None
