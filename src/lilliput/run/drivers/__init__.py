"""One driver a verb, one file each, found by listing this folder; there is no list to extend."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lilliput.parts.layer import Layer
from lilliput.run.driver import Driver, LinearDriver
from lilliput.stats.site import SiteStats
from lilliput.verbs.spec import Spec, Task

DriverT = TypeVar("DriverT", bound=Driver)


@functools.cache
def discover() -> Mapping[type[Spec[Any]], Driver]:
    """All drivers by the verb's spec. Raises RuntimeError for a file that declares none, or one for another stage."""
    drivers: dict[type[Spec[Any]], Driver] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        driver = vars(module).get("DRIVER")
        if not isinstance(driver, Driver):
            raise RuntimeError(f"{module.__file__} declares no DRIVER")
        if driver.stage is not driver.verb.stage:
            raise RuntimeError(
                f"{module.__file__} drives '{driver.verb.verb}', whose stage is {driver.verb.stage.value}"
            )
        if driver.verb in drivers:
            raise RuntimeError(f"two drivers run '{driver.verb.verb}'")
        drivers[driver.verb] = driver
    return drivers


def find(task: Task) -> Driver:
    """What carries out a step. Raises RuntimeError where nothing does."""
    kind = type(task.spec)
    if kind not in discover():
        raise RuntimeError(f"{task.label}: no file of lilliput/run/drivers runs '{kind.verb}'")
    return discover()[kind]


def applied(tasks: Sequence[Task], stats: SiteStats, layer: Layer) -> Layer:
    """The layer after steps on it alone, in order; `stats` are of what enters it."""
    for task in tasks:
        layer = of(task, LinearDriver).run(task, layer, stats.through(layer.inputs))
    return layer


def of(task: Task, kind: type[DriverT]) -> DriverT:
    """What carries out a step at the stage of this kind of driver. Raises RuntimeError where that is another one's."""
    driver = find(task)
    if not isinstance(driver, kind):
        raise RuntimeError(f"{task.label} is carried out on {driver.stage.value}, not on {kind.stage.value}")
    return driver
