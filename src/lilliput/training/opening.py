"""Maps that are trained alone before the student is: both models stay as they are meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.progress import Progress
from lilliput.training.loop import order
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.watch import watching
from lilliput.verbs.objective import FeatureIO
from lilliput.verbs.train import TrainOptions


def open_maps(
    student: Student, text: Text, o: TrainOptions, steps: int, loss: Callable[[FeatureIO], Tensor], progress: Progress
) -> tuple[float, ...]:
    """Train the maps for `steps` steps; the loss of each. Raises LilliputError where it is not finite."""
    compared, maps = student.compared, student.maps
    if compared is None or maps is None:
        raise RuntimeError("maps are to be trained, and the objective has made none")
    optimizer = torch.optim.Adam(maps.parameters(), lr=o.lr * compared.rate, foreach=False)
    losses: list[float] = []
    for step, samples in enumerate(order(len(text.lessons), _for(o, steps))):
        rows, total = text.rows(samples), 0.0
        optimizer.zero_grad(set_to_none=True)
        for batch in text.batches(rows, o.at_once or 1):
            with torch.no_grad(), watching(student.skeleton, compared.fields, compared.last) as shown:
                student.skeleton.read(batch.ids, batch.positions)
            share = batch.tokens / max(rows.tokens, 1)
            value = loss(student.features(batch, shown)) * share
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        if not math.isfinite(total):
            raise LilliputError(f"the loss of the maps is {total} at step {step + 1} of {steps}: lower lr")
        optimizer.step()
        losses.append(total)
        progress.step(step + 1, steps, f"maps, loss {total:.4f}")
    return tuple(losses)


def _for(o: TrainOptions, steps: int) -> TrainOptions:
    """The same options for so many steps, with an order of samples of their own."""
    return o.model_copy(update={"steps": steps, "seed": o.seed + 1})
