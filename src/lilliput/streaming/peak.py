"""What losses and gradients of a whole model take with one block resident: upper bounds from shapes."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.anatomy.model import Block
from lilliput.machine.cost import Cost
from lilliput.streaming.backward import LOGITS


def of_gradients(
    blocks: Sequence[Block], hidden: int, vocabulary: int, tokens: int, itemsize: int, *, outside: bool = True
) -> Cost:
    """What a backward pass holds at its fullest, beyond what is always there.

    `outside`: whether gradients of the final tensors and the head are wanted too.
    """
    widest = 0
    for block in {id(x): x for x in blocks}.values():
        weights = sum(x.parameters for x in block.linears)
        largest = max(x.parameters for x in block.linears)
        held = sum(x.out_features + x.in_features for x in block.linears if x.expert is None or x.expert < 2)
        widest = max(widest, weights * (itemsize + 4) + 12 * largest + 3 * tokens * (held + 8 * hidden) * 4)
    logits = min(max(LOGITS, vocabulary), tokens * vocabulary)
    head = vocabulary * hidden * (2 * itemsize + (10 if outside else 4)) + 4 * 4 * logits + 8 * tokens * hidden * 4
    return Cost(ram=max(widest, head))


def of_loss(
    blocks: Sequence[Block], hidden: int, vocabulary: int, tokens: int, itemsize: int, stored: int, beside: int
) -> Cost:
    """What a loss without gradients holds at its fullest; `stored`: itemsize of the checkpoint, `beside`: what
    making a weight takes meanwhile."""
    widest = 0
    for block in {id(x): x for x in blocks}.values():
        weights = sum(x.parameters for x in block.linears) * itemsize
        held = max(x.out_features + x.in_features for x in block.linears)
        widest = max(widest, weights + max(beside, 3 * tokens * (held + 4 * hidden) * 4))
    logits = min(max(LOGITS, vocabulary), tokens * vocabulary)
    head = vocabulary * hidden * (itemsize + max(itemsize, stored)) + 3 * 4 * logits + 4 * tokens * hidden * 4
    return Cost(ram=max(widest, head))
