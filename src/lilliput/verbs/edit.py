"""The verb `edit`: what leaves the model, and the bases in which its blocks see the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Groups
from lilliput.errors import PlanError
from lilliput.stats.site import SiteStats
from lilliput.verbs.edits import EditPlan
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True, kw_only=True)
class Edit(Spec[OptionsT]):
    """`run(groups, stats, options)`: what leaves of each block's groups, by statistics of what enters each place.

    No recipe runs it yet: its steps are refused.
    """

    verb: ClassVar[str] = "edit"
    family: ClassVar[str] = "edit"
    stage: ClassVar[Stage] = Stage.MODEL

    run: Callable[[Sequence[Groups], Mapping[str, SiteStats], OptionsT], EditPlan]
    writes: Writes = "fold"

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        raise PlanError(
            f"{task.label} changes the structure of the model: the transforms that it puts between blocks have no "
            "place in any layout that is written here; leave the step out"
        )
