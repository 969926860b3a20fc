"""What the file holds of a linear when a step has another target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lilliput import export
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan, retargeted
from lilliput.target import Target
from lilliput.verbs.spec import Task


def sizes(plan: Plan, linear: LinearPlan, task: Task) -> Callable[[Target], int]:
    """Bytes in the file by the target of the step `task`."""
    exporter = export.get(plan.exporter)

    def size(target: Target) -> int:
        x = retargeted(linear, task, target)
        outcome = replace(
            plan.outcomes[linear.name],
            scheme=x.scheme,
            sparsity=x.sparsity,
            pattern=x.pattern,
            kept=x.kept,
            places=x.places,
        )
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in exporter.describe(outcome).values())

    return size
