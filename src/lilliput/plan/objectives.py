"""What a training step learns by, and the linears that it trains."""

from __future__ import annotations

import math
from typing import Any

from lilliput import methods
from lilliput.errors import PlanError
from lilliput.model.weights import Model
from lilliput.plan.resolve import LinearPlan, Resolved, matches
from lilliput.verbs.objective import Objective, Widths
from lilliput.verbs.spec import Method, Task
from lilliput.verbs.train import common


def objective_of(task: Task) -> tuple[Method, Objective[Any], Any]:
    """The objective that a training step names, its spec and its options. Raises PlanError where there is none of that
    name, or its options are wrong."""
    o = common(task.options)
    method = methods.get(o.objective)
    if not isinstance(method.spec, Objective):
        raise PlanError(f"{task.label}: '{o.objective}' is no objective, but of the verb '{method.spec.verb}'")
    return method, method.spec, method.parse(o.objective_options)


def trained(resolved: Resolved, task: Task) -> tuple[LinearPlan, ...]:
    """The linears of the blocks that a training step trains."""
    where = resolved.recipe.steps[task.step].where
    return tuple(x for x in resolved.linears if matches(where, x.name, x.linear))


def widths(model: Model, teacher: Model) -> Widths:
    """What objectives may ask of the sizes of student and teacher."""
    configs = (model.skeleton.config, teacher.skeleton.config)
    heads = [int(getattr(x, "num_attention_heads", 1) or 1) for x in configs]
    groups = [int(getattr(x, "num_key_value_heads", None) or heads[n]) for n, x in enumerate(configs)]
    return Widths(
        student=model.skeleton.hidden_size,
        teacher=teacher.skeleton.hidden_size,
        blocks=len(model.skeleton.block_names),
        teacher_blocks=len(teacher.skeleton.block_names),
        heads=(heads[0], heads[1]),
        groups=(groups[0], groups[1]),
    )


def parameters(model: Model) -> int:
    """Numbers that the model has, tied ones once."""
    return sum(math.prod(shape) for shape in model.skeleton.shapes.values())
