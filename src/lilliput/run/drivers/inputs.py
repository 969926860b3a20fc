"""How `inputs` is carried out: beside a layer's weights, by the statistics of what enters it."""

from __future__ import annotations

from dataclasses import replace

from lilliput.errors import LilliputError
from lilliput.parts.layer import Layer
from lilliput.run.driver import LinearDriver
from lilliput.stats.site import SiteStats
from lilliput.verbs.inputs import Inputs
from lilliput.verbs.spec import Task


def run(task: Task, layer: Layer, stats: SiteStats) -> Layer:
    """The layer with a grid for its inputs. Raises LilliputError where static scales are asked for inputs that no
    calibration token has."""
    if task.needs and stats.count == 0:
        raise LilliputError(
            f"{task.label}: no calibration token reaches {layer.name}, so its inputs have no range: give more text, or "
            "take scales that are found while the model runs"
        )
    return replace(layer, activation=task.of(Inputs).run(layer, stats, task.target, task.options))


DRIVER = LinearDriver(verb=Inputs, run=run)
