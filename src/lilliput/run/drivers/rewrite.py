"""How `rewrite` is carried out: the leader decides for all ranks what moves along which link."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lilliput.folds.kinds import ScaleFold
from lilliput.machine import ranks
from lilliput.run.driver import BlockDriver
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO, BlockView


def run(task: Task, view: BlockView, io: BlockIO) -> Sequence[ScaleFold]:
    """What the step decides on."""
    rewrite = task.of(Rewrite).run
    if ranks.size() == 1:
        return rewrite(view, io, task.target, task.options)
    links = view.anatomy.links
    scales: list[tuple[int, list[float]]] = []
    if ranks.lead():
        number = {id(link): n for n, link in enumerate(links)}
        folds = rewrite(view, io, task.target, task.options)
        scales = [(number[id(fold.link)], fold.scale.tolist()) for fold in folds]
    return [ScaleFold(links[n], torch.tensor(scale)) for n, scale in ranks.agreed(scales)]


DRIVER = BlockDriver(verb=Rewrite, run=run)
