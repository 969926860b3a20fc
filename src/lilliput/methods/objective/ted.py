"""TED: what the task needs of each block, found by filters, goes to the teacher's.

Stage 1 trains a filter f_l, a linear map, behind each block of student and teacher, which themselves stay as they are:
the model's own head has to foretell the text from it,

    L_1 = sum over l of -log softmax(head(f_l(h_l)))(y).

Stage 2 trains the student and its filters, the teacher's being fixed:

    L = a KL(p || q) + (1 - a) (-log q(y)) + w mean over l of D(f_l(h_l), f^T_{g(l)}(h^T_{g(l)})),

g every k-th block, D the mean square of differences, relative to the teacher's own by default. Where the two widths
differ, what the student's filter gives is mapped to the teacher's, by a linear map that is learned in stage 2. Filters
begin as the identity and are left behind.

Paper: Liang et al. 2023, arXiv 2210.01351. Cost: the teacher stands beside the student, whole in memory; a matrix of
the hidden size a block for each of them, with moments; stage 1 passes through the head once a block. Limits: the text
is the task.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.algebra.compared import Scale, distance, side_by_side
from lilliput.methods.objective import logit_kd
from lilliput.verbs.objective import FeatureIO, Objective, Widths


class Options(logit_kd.Options):
    """See the module's docstring."""

    weight: float = Field(1.0, ge=0.0, description="w: of the filtered states, beside that of the distributions")
    filter_steps: int = Field(50, ge=0, description="steps of stage 1")
    scale: Scale = Field("layer", description="what differences are relative to: the teacher's size, or vectors' own")


class Filters(nn.Module):
    """By block, of student and teacher; wider: from the student's width to the teacher's, where they differ."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.student = nn.ModuleList(_identity(widths.student) for _ in range(widths.blocks))
        self.teacher = nn.ModuleList(_identity(widths.teacher) for _ in range(widths.teacher_blocks))
        same = widths.student == widths.teacher
        self.wider = None if same else nn.Linear(widths.student, widths.teacher, bias=False)


def _identity(width: int) -> nn.Linear:
    linear = nn.Linear(width, width)
    with torch.no_grad():
        nn.init.eye_(linear.weight)
        linear.bias.zero_()
    return linear


def _filters(io: FeatureIO) -> Filters:
    found = io.need_maps()
    if not isinstance(found, Filters):
        raise RuntimeError("the maps are those of another objective")
    return found


def opening_loss(io: FeatureIO, o: Options) -> Tensor:
    """Stage 1: mean over the tokens of what all filters lose, a scalar."""
    filters, labels = _filters(io), io.labels[io.counts]
    total = io.student.hidden[0].new_zeros((), dtype=torch.float32)
    sides = ((filters.student, io.student, io.heads[0]), (filters.teacher, io.teacher, io.heads[1]))
    for own, seen, head in sides:
        for layer, states in zip(own, seen.hidden[1:], strict=True):
            kept = states.detach()[io.counts]
            logits = head(layer(kept.float()).to(kept.dtype))
            total = total + nn.functional.cross_entropy(logits.float(), labels)
    return total


def loss(io: FeatureIO, o: Options) -> Tensor:
    """Stage 2: the term of the filtered states, a scalar."""
    filters = _filters(io)
    ours = [layer(x.float()) for layer, x in zip(filters.student, io.student.hidden[1:], strict=True)]
    if filters.wider is not None:
        ours = [filters.wider(x) for x in ours]
    with torch.no_grad():
        theirs = [layer(x.float()) for layer, x in zip(filters.teacher, io.teacher.hidden[1:], strict=True)]
    places = side_by_side(len(ours), len(theirs), "skip")
    pairs = [distance(x, theirs[n - 1], io.counts, "l2", o.scale) for x, n in zip(ours, places, strict=True)]
    return o.weight * torch.stack(pairs).mean()


METHOD = Objective(
    paper="Liang et al. 2023, arXiv 2210.01351",
    options=Options,
    covers={"ted": [{"method": "wanda"}, {"method": "full", "options": {"objective": "ted"}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=logit_kd.loss,
    features_loss=loss,
    sees=lambda o: frozenset({"hidden"}),
    maps=lambda widths, o: Filters(widths),
    opening=lambda o: o.filter_steps,
    opening_loss=opening_loss,
    temperature=lambda o: o.temperature,
)
