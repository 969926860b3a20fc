"""A recipe meets an anatomy: which step does what to which linear, and whether the order makes sense."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lilliput import methods
from lilliput.anatomy.model import Anatomy, Block, Linear
from lilliput.anatomy.tables import EMBED, HEAD
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known, scales
from lilliput.parts.linear import divides
from lilliput.parts.scheme import Scheme
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target
from lilliput.units import few
from lilliput.verbs.draft import Draft
from lilliput.verbs.spec import Around, Spec, Stage, Task

GROUPS = (128, 64, 32)
OUTSIDE = -1  # the block of what is in none


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one linear: its tasks in order and what it becomes."""

    block: int
    linear: Linear
    name: str  # canonical, without ".weight"
    tasks: tuple[Task, ...]
    scheme: Scheme
    sparsity: float | None
    pattern: str | None
    kept: int | None
    places: str
    dtype: torch.dtype  # of the plain tensor that it was

    @property
    def alone(self) -> tuple[Task, ...]:
        """The steps that look at the linear by itself (or at its site)."""
        return tuple(task for task in self.tasks if task.spec.stage is Stage.LINEAR)

    @property
    def together(self) -> tuple[Task, ...]:
        """The steps that look at it together with the rest of its block."""
        return tuple(task for task in self.tasks if task.spec.stage is Stage.CLOSE)


def stacked(plans: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    """The linears of one site that steps work on, those that may be treated as one together: equal steps, each of
    which treats every row by itself. They share what there is one of for a matrix, such as nvfp4's global scale."""
    groups: list[list[LinearPlan]] = []
    for plan in plans:
        if not plan.alone:
            continue
        single = any(
            not task.spec.stacks(task.target, task.options)
            or task.target.group_size == 0
            or scales.joins_rows(task.target.scale_dtype)
            for task in plan.alone
        )
        if groups and not single and groups[-1][0].tasks == plan.tasks:
            groups[-1].append(plan)
        else:
            groups.append([plan])
    return groups


@dataclass(frozen=True)
class Resolved:
    """All steps, and all linears of all blocks."""

    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    tasks: tuple[Task, ...]
    tables: tuple[LinearPlan, ...] = ()  # the embedding and the head, where a step compresses them
    notes: tuple[str, ...] = ()  # what the model lacks

    @property
    def planned(self) -> tuple[LinearPlan, ...]:
        """All that is or may be compressed: the linears of the blocks, then the tables."""
        return (*self.linears, *self.tables)

    @cached_property
    def needs(self) -> frozenset[str]:
        """Statistics that some step reads."""
        return frozenset().union(*(task.needs for task in self.tasks))

    @property
    def flows(self) -> bool:
        """Whether the block loop takes calibration samples through the blocks."""
        later = [x for x in self.tasks if x.spec.stage is not Stage.MODEL]
        looking = (Stage.BLOCK, Stage.RUNNING, Stage.CACHE)
        return any(x.needs or (x.spec.stage in looking and x.spec.tokens(x.options)) for x in later)

    @property
    def reads_tokens(self) -> bool:
        """Whether any step looks at calibration samples."""
        return any(task.needs or task.fisher or task.spec.tokens(task.options) for task in self.tasks)

    def at(self, stage: Stage) -> tuple[Task, ...]:
        """The steps that are carried out at a stage."""
        return tuple(task for task in self.tasks if task.spec.stage is stage)

    def of(self, kind: type[Spec[Any]]) -> tuple[Task, ...]:
        """The steps of a verb."""
        return tuple(task for task in self.tasks if isinstance(task.spec, kind))

    def of_block(self, block: int) -> tuple[LinearPlan, ...]:
        return tuple(x for x in self.linears if x.block == block)

    def stacks(self) -> dict[str, str]:
        """For each linear of a block that steps work on, the first of those that are treated as one with it."""
        sites: dict[tuple[int, str], list[LinearPlan]] = {}
        for x in self.linears:
            sites.setdefault((x.block, x.linear.site), []).append(x)
        return {x.name: some[0].name for plans in sites.values() for some in stacked(plans) for x in some}

    def kinds(self, blocks: Sequence[Block]) -> tuple[int, ...]:
        """The first of the blocks that are alike and whose linears become alike."""
        first: dict[Any, int] = {}
        for number, block in enumerate(blocks):
            becomes = tuple((tuple(task.step for task in x.tasks), x.scheme) for x in self.of_block(number))
            first.setdefault((id(block), becomes), number)
        return tuple(first.values())

    def fisher(self, samples: int) -> int:
        """How many of `samples` calibration samples the backward pass runs for squared gradients; 0: nobody reads
        them."""
        return max((task.fisher_samples(samples) for task in self.tasks), default=0)

    def squared(self) -> frozenset[str]:
        """The linears whose squared gradients some step reads."""
        dividing = [name for task in self.at(Stage.TARGETS) if task.fisher for name in self.governed(task)]
        return frozenset(dividing) | {x.name for x in self.linears if any(task.fisher for task in x.tasks)}

    def governed(self, task: Task) -> dict[str, Task]:
        """By linear, the step whose target `task` may decide: the next one after it on the linear."""
        governors: dict[str, Task] = {}
        for plan in self.planned:
            later = [x for x in plan.tasks if x.step > task.step]
            if later and matches(self.recipe.steps[task.step].where, plan.name, plan.linear):
                governors[plan.name] = later[0]
        return governors

    def covered(self, task: Task) -> tuple[Linear, ...]:
        """The linears that a step works on, or whose targets it may decide."""
        governed = self.governed(task) if task.spec.stage is Stage.TARGETS else {}
        own = (x for x in self.planned if x.name in governed or any(y.step == task.step for y in x.tasks))
        return tuple(x.linear for x in own)

    def quantized(self) -> dict[str, Target]:
        """By linear, the target of the step that quantizes it."""
        return {x.name: t.target for x in self.linears for t in x.tasks if t.spec.writes == "quantized"}

    def with_steps(self, steps: Sequence[Step]) -> Resolved:
        """With further steps at its end that touch no linear, such as those for the cache. Raises PlanError where they
        cannot stand there."""
        recipe = self.recipe.model_copy(update={"steps": (*self.recipe.steps, *steps)})
        added = ordered(recipe)[len(self.recipe.steps) :]
        tasks = (replace(x, target=_completed(x, ())) for x in added)
        return replace(self, recipe=recipe, tasks=(*self.tasks, *tasks))

    def with_targets(self, task: Task, targets: Mapping[str, Target]) -> Resolved:
        """What it becomes when `task` has decided. Raises LilliputError for a linear that it does not govern."""
        governed = self.governed(task)
        if targets.keys() - governed.keys():
            name = min(targets.keys() - governed.keys())
            raise LilliputError(f"{task.method.name} decided about {name}, which no later step compresses")

        def decided(plans: Sequence[LinearPlan]) -> tuple[LinearPlan, ...]:
            return tuple(retargeted(x, governed[x.name], targets[x.name]) if x.name in targets else x for x in plans)

        return replace(self, linears=decided(self.linears), tables=decided(self.tables))


def retargeted(plan: LinearPlan, task: Task, target: Target) -> LinearPlan:
    """The linear when its step `task` has another target. Raises PlanError where the step cannot have it."""
    tasks = [replace(task, target=target) if x.step == task.step else x for x in plan.tasks]
    return _plan_linear(plan.name, plan.linear, plan.block, plan.dtype, tasks, {})


def matches(where: Where, name: str, linear: Linear) -> bool:
    """Whether a step's `where` covers a linear: patterns may name it in full, within its block, shortly, or by role."""
    labels = (name, linear.name, linear.name.rsplit(".", 1)[-1], linear.role, *((HEAD,) if linear.also else ()))

    def hit(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns for label in labels)

    if linear.role in (EMBED, HEAD):  # only where they are named, which the default `exclude` does not undo
        named = [x for x in where.include if x != "*"]
        return hit(named) and not hit([x for x in where.exclude if x not in (EMBED, HEAD)])
    return hit(where.include) and not hit(where.exclude)


def _covers(task: Task, where: Where, name: str, linear: Linear) -> bool:
    """Whether a step works on a linear."""
    return matches(where, name, linear) and task.spec.works_on(linear, task.options)


def _group(target: Target, widths: Sequence[int], at: str) -> int:
    if target.group_size == "channel":
        return -1
    if target.group_size == "tensor":
        return 0
    if target.group_size != "auto":
        if target.group_size > max(widths):
            # In a narrower layer among wide ones a group simply ends early; in all of them it is a slip.
            raise PlanError(
                f"{at}: a group of {target.group_size} inputs is more than any of its layers has (at most "
                f"{max(widths)}): give a smaller group, or 'channel' for one per output"
            )
        return int(target.group_size)
    return next((g for g in GROUPS if all(width % g == 0 for width in widths)), -1)


def _plan_linear(
    name: str,
    linear: Linear,
    block: int,
    dtype: torch.dtype,
    tasks: Sequence[Task],
    targets: Mapping[int, Target],
) -> LinearPlan:
    """What the steps make of a linear; `asked` are targets as the recipe names them, by step."""
    mine: list[Task] = []
    for task in tasks:
        target = task.spec.inherited(task, mine, targets.get(task.step), name)
        mine.append(replace(task, target=known.fitting(target, linear.in_features)))
    for task in mine:
        task.spec.accompanied(task, mine, name)
    draft = Draft(dtype)
    for number in range(len(mine)):
        task = mine[number] = replace(mine[number], first=mine[number].spec.opens(draft, linear))
        draft = task.spec.drafted(task, mine[number + 1 :], name, linear, draft)
    zeros = draft.sparsity, draft.pattern, draft.kept, draft.places
    return LinearPlan(block, linear, name, tuple(mine), draft.scheme, *zeros, dtype)


def _completed(task: Task, later: Sequence[Task]) -> Target:
    """The target of a step with what its method and format say of what it leaves open; `later`: the steps after it."""
    target = task.target
    if task.spec.prepares and target.bits is None:
        target = next((x.target for x in later if x.spec.writes == "quantized"), target)
    try:
        target = known.completed(target)
    except PlanError as error:
        raise PlanError(f"{task.label}: {error}") from None
    return task.spec.completed(target)


def _plan_table(table: Linear, dtype: torch.dtype, tasks: Sequence[Task]) -> LinearPlan:
    """What happens to the embedding or the head, which is compressed a few rows at a time: it may be the largest tensor
    of all. Raises PlanError for steps that look at more than single rows of it."""
    plan = _plan_linear(table.name, table, OUTSIDE, dtype, tasks, {})
    for task in plan.tasks:
        label = f"{task.label} on {table.name}"
        if not task.spec.tabular() or task.fisher or len(tasks) > 1:
            raise PlanError(
                f"{label}: an embedding or head takes a single step, which quantizes it row by row without "
                "squared gradients: give it only to rtn or gptq, or leave it out"
            )
    if not divides(plan.scheme, table.out_features, table.in_features):
        raise PlanError(
            f"{plan.tasks[0].label} on {table.name}: the rows of {plan.scheme.describe()} cannot be read one "
            "by one, which an embedding requires: choose a group_size, 'channel' or another format"
        )
    return plan


def ordered(recipe: Recipe) -> list[Task]:
    """The steps of a recipe, with targets as it names them. Raises PlanError for options that are none, and for steps
    that cannot stand in this order."""
    used = [methods.get(step.method) for step in recipe.steps]
    tasks = [
        Task(number, method, step.target, method.parse(step.options))
        for number, (step, method) in enumerate(zip(recipe.steps, used, strict=True))
    ]
    for task, step in zip(tasks, recipe.steps, strict=True):
        if not task.spec.targeted and (step.target.model_fields_set or step.where != Where()):
            raise PlanError(
                f"{task.label} is about the whole model, with options and neither a target nor `where`: leave them out"
            )
        task.spec.ordered(task, tasks)
    return tasks


def resolve(
    recipe: Recipe,
    anatomy: Anatomy,
    scale_dtype: torch.dtype,
    *,
    dtype_of: Callable[[str], torch.dtype],
    width: int = 0,
    tables: Sequence[Linear] = (),
) -> Resolved:
    """Decide everything about a recipe on a model. Raises PlanError for every mistake that a user can make in it.

    `dtype_of` gives the dtype in which a tensor is written, by its name; `width` is that of the residual
    stream, for methods that rotate it; `tables` are the embedding and the head.
    """
    targets = ordered(recipe)
    everything = [
        (number, f"{prefix}.{linear.name}", linear)
        for number, (prefix, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True))
        for linear in block.linears
    ]
    tasks: list[Task] = []
    idle: list[str] = []
    for task, step in zip(targets, recipe.steps, strict=True):
        target = _completed(task, targets[task.step + 1 :])
        covered = [x for _, name, x in everything if _covers(task, step.where, name, x)]
        covered += [x for x in tables if task.spec.stage is Stage.LINEAR and _covers(task, step.where, x.name, x)]
        if not covered and not tables and set(step.where.include) <= {EMBED, HEAD}:
            idle.append(f"{task.label} does nothing: {anatomy.architecture} has no plain embedding or head.")
            continue
        if not covered:
            raise PlanError(
                f"{task.label} applies to no layer: 'where' includes {list(step.where.include)} "
                f"and excludes {list(step.where.exclude)}; layers have names like {everything[0][1]}"
            )
        group = _group(target, sorted({x.in_features for x in covered}), task.label)
        scales = str(scale_dtype).removeprefix("torch.") if target.scale_dtype == "auto" else target.scale_dtype
        target = target.model_copy(update={"group_size": group, "scale_dtype": scales})
        tasks.append(replace(task, target=target))

    def on(name: str, linear: Linear, *stages: Stage) -> list[Task]:
        return [x for x in tasks if x.spec.stage in stages and _covers(x, recipe.steps[x.step].where, name, linear)]

    named = {task.step: task.target for task in targets}
    plans = [
        _plan_linear(
            name, linear, block, dtype_of(f"{name}.weight"), on(name, linear, Stage.LINEAR, Stage.CLOSE), named
        )
        for block, name, linear in everything
    ]
    outside = [(table, on(table.name, table, Stage.LINEAR)) for table in tables]
    flat = tuple(_plan_table(table, dtype_of(f"{table.name}.weight"), mine) for table, mine in outside if mine)
    resolved = Resolved(
        recipe=recipe,
        linears=tuple(plans),
        tasks=tuple(tasks),
        tables=flat,
        notes=(*idle, *_narrowed(tasks, [*plans, *flat])),
    )
    rounded = frozenset(x.name for x in plans if x.scheme.activation is not None)
    for task in tasks:
        task.spec.suits(task, Around(anatomy, width, tasks, resolved.quantized(), resolved.governed(task), rounded))
    return resolved


def _narrowed(tasks: Sequence[Task], plans: Sequence[LinearPlan]) -> list[str]:
    """Where rows are no multiple of a format's blocks, and what takes its place there."""
    formats_by_step = {task.step: task.target.format for task in tasks}
    replaced: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for task in plan.tasks:
            if task.spec.writes == "quantized" and task.target.format != formats_by_step[task.step]:
                replaced.setdefault((formats_by_step[task.step], task.target.format), []).append(plan.name)
    return [
        f"{narrow} instead of {name}, whose blocks do not divide the rows: {few(names)} ({len(names)} in all)."
        for (name, narrow), names in replaced.items()
    ]


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, in a fixed order."""
    return recipe.model_dump(mode="json")
