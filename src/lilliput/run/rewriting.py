"""What a rewrite sees of a block, what it decides, and how the block takes that over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lilliput.anatomy.model import Block
from lilliput.anatomy.skeleton import Skeleton
from lilliput.folds.kinds import Fold, HeadFold, PermuteFold, ScaleFold, ShiftFold
from lilliput.machine import ranks
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.run.running import movement
from lilliput.stats.site import SiteStats
from lilliput.streaming.collect import collect
from lilliput.streaming.forward import Batches, through
from lilliput.streaming.states import Activations
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO, BlockView


def seen(
    model: Model, index: int, weights: BlockWeights, task: Task, batches: Batches | None, inputs: Activations | None
) -> tuple[BlockView, BlockIO] | None:
    """The linears of a block that a step may fold into, and what enters them; None where nothing can be folded. The
    block is loaded where there is calibration."""
    anatomy = weights.anatomy
    moves = task.of(Rewrite).moves
    if moves == "channels":
        readers = {name for x in anatomy.groups.channels for name in x.readers}
        linked = {anatomy.linear(name).site for name in readers}
    else:
        links = [x for x in anatomy.links if moves == "scales" or x.head]
        readers, linked = {name for x in links for name in x.readers}, {x.site for x in links}
    sites = [site for site in anatomy.sites if site.name in linked]
    if not sites:
        return None
    stats: Mapping[str, SiteStats] = {}
    moved = None
    if task.needs and batches is not None and inputs is not None:
        # Experts may be skipped by a batch, so only a block without them can be left early.
        early = all(x.expert is None for x in anatomy.linears)
        passes = through(model.skeleton, index, batches, inputs, None)
        needs = {site.name: task.needs for site in sites}
        stats = collect(model.skeleton, index, sites, needs, passes, stop_after=early)
        moved = movement(model, index, anatomy, batches, inputs)
    covered = {x.name for x in anatomy.linears}
    names = sorted(readers & covered)
    views = {n: weights.linear(anatomy.linear(n)).to(weights.device) for n in names} if ranks.lead() else {}
    norms = [x for x in anatomy.links if x.kind == "norm"] if ranks.lead() else ()
    gains = {x.producer: weights.tensor(f"{x.producer}.weight").float() + x.offset for x in norms}
    return BlockView(anatomy, views, gains), BlockIO(stats, movement=moved)


def decided(task: Task, view: BlockView, io: BlockIO) -> Sequence[Fold]:
    """What the step decides on, the same for all ranks."""
    rewrite = task.of(Rewrite).run
    if ranks.size() == 1:
        return rewrite(view, io, task.target, task.options)
    folds = rewrite(view, io, task.target, task.options) if ranks.lead() else ()
    return [_unpacked(view.anatomy, *entry) for entry in ranks.agreed([_packed(view.anatomy, x) for x in folds])]


def _packed(anatomy: Block, fold: Fold) -> tuple[str, int, list[Any]]:
    """A fold as plain data: its kind, its link or MLP by number, and its values."""
    if isinstance(fold, PermuteFold):
        return (
            "order",
            next(n for n, x in enumerate(anatomy.groups.channels) if x is fold.channels),
            fold.order.tolist(),
        )
    number = next(n for n, x in enumerate(anatomy.links) if x is fold.link)
    if isinstance(fold, ScaleFold):
        return "scale", number, fold.scale.tolist()
    if isinstance(fold, ShiftFold):
        return "shift", number, fold.shift.tolist()
    return "heads", number, fold.matrices.tolist()


def _unpacked(anatomy: Block, kind: str, number: int, values: list[Any]) -> Fold:
    match kind:
        case "order":
            return PermuteFold(anatomy.groups.channels[number], torch.tensor(values))
        case "scale":
            return ScaleFold(anatomy.links[number], torch.tensor(values))
        case "shift":
            return ShiftFold(anatomy.links[number], torch.tensor(values))
        case _:
            return HeadFold(anatomy.links[number], torch.tensor(values, dtype=torch.float64))


def load_folded(skeleton: Skeleton, weights: BlockWeights, *, vectors_only: bool = False) -> None:
    """Put the tensors that folds have touched into the loaded block; `vectors_only`: gains and biases alone, where
    linears are compressed already."""
    for name in weights.names():
        if weights.folded(name) and not (vectors_only and len(skeleton.shapes[weights.canonical(name)]) > 1):
            skeleton.load({weights.canonical(name): weights.tensor(name)})
