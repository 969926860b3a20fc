"""The two tables outside the blocks that recipes may compress: the token embedding and the head.

A tied head is the embedding: one tensor, used in two places, compressed once.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lilliput.anatomy.model import Linear
from lilliput.anatomy.skeleton import Skeleton

EMBED, HEAD = "embed", "lm_head"  # what recipes call them, whatever their modules are called


def tables(skeleton: Skeleton) -> tuple[Linear, ...]:
    """The embedding and the head as linears [vocabulary, hidden], by canonical names; one of them where they are tied.

    Their site is what the head reads. Tables that are no plain nn.Embedding and nn.Linear are left out, and so are
    embeddings of other things than tokens.
    """
    model: Any = skeleton.model
    paths = {id(module): path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), skeleton.head_module
    linears: list[Linear] = []
    if isinstance(table, nn.Embedding):
        also = (paths[id(head)],) if skeleton.tied else ()
        linears.append(_table(paths[id(table)], EMBED, table.weight.shape, also=also))
    if isinstance(head, nn.Linear) and not skeleton.tied:
        linears.append(_table(paths[id(head)], HEAD, head.weight.shape, bias=head.bias is not None))
    return tuple(x for x in linears if f"{x.name}.weight" in skeleton.shapes)


def multiplies(table: Linear) -> bool:
    """Whether a table is a head, or an embedding that is the head as well; an embedding by itself is only looked up."""
    return table.role == HEAD or bool(table.also)


def _table(name: str, role: Any, shape: Any, *, bias: bool = False, also: tuple[str, ...] = ()) -> Linear:
    return Linear(name, role, HEAD, int(shape[0]), int(shape[1]), bias=bias, also=also)
