"""How `compress` is carried out: on a layer, when its inputs have arrived."""

from __future__ import annotations

from lilliput.parts import kept
from lilliput.parts.layer import Layer
from lilliput.run.driver import LinearDriver
from lilliput.stats.site import SiteStats
from lilliput.verbs.compress import Compress
from lilliput.verbs.spec import Task


def run(task: Task, layer: Layer, stats: SiteStats) -> Layer:
    """The layer with a part or a support more."""
    spec = task.of(Compress)
    layer = kept.opened(layer, task.first) if spec.compensates else layer
    return spec.run(layer, stats, task.target, task.options)


DRIVER = LinearDriver(verb=Compress, run=run)
