"""What a rewrite sees of a block, what it decides, and how the block takes that over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lilliput.anatomy.skeleton import Skeleton
from lilliput.folds.kinds import Fold, PermuteFold, ScaleFold
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
    permutes = task.of(Rewrite).permutes
    moved = {name for x in anatomy.groups.channels for name in x.readers} if permutes else set[str]()
    linked = {anatomy.linear(name).site for name in moved} if permutes else {link.site for link in anatomy.links}
    sites = [site for site in anatomy.sites if site.name in linked]
    if not sites:
        return None
    stats: Mapping[str, SiteStats] = {}
    moves = None
    if task.needs and batches is not None and inputs is not None:
        # Experts may be skipped by a batch, so only a block without them can be left early.
        early = all(x.expert is None for x in anatomy.linears)
        passes = through(model.skeleton, index, batches, inputs, None)
        needs = {site.name: task.needs for site in sites}
        stats = collect(model.skeleton, index, sites, needs, passes, stop_after=early)
        moves = movement(model, index, anatomy, batches, inputs)
    covered = {x.name for x in anatomy.linears}
    readers = moved if permutes else {name for link in anatomy.links for name in link.readers}
    names = sorted(readers & covered)
    views = {n: weights.linear(anatomy.linear(n)).to(weights.device) for n in names} if ranks.lead() else {}
    return BlockView(anatomy, views), BlockIO(stats, movement=moves)


def decided(task: Task, view: BlockView, io: BlockIO) -> Sequence[Fold]:
    """What the step decides on, the same for all ranks."""
    rewrite = task.of(Rewrite).run
    if ranks.size() == 1:
        return rewrite(view, io, task.target, task.options)
    links, groups = view.anatomy.links, view.anatomy.groups.channels
    plain: list[tuple[str, int, list[float] | list[int]]] = []
    for fold in rewrite(view, io, task.target, task.options) if ranks.lead() else ():
        if isinstance(fold, ScaleFold):
            plain.append(("scale", next(n for n, x in enumerate(links) if x is fold.link), fold.scale.tolist()))
        else:
            number = next(n for n, x in enumerate(groups) if x is fold.channels)
            plain.append(("order", number, fold.order.tolist()))
    return [
        ScaleFold(links[n], torch.tensor(values)) if kind == "scale" else PermuteFold(groups[n], torch.tensor(values))
        for kind, n, values in ranks.agreed(plain)
    ]


def load_folded(skeleton: Skeleton, weights: BlockWeights) -> None:
    """Put the tensors that folds have touched into the loaded block."""
    for name in weights.names():
        if weights.folded(name):
            skeleton.load({weights.canonical(name): weights.tensor(name)})
