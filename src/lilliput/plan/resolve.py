"""A recipe meets an anatomy: which step does what to which linear, and whether the order makes sense."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel

from lilliput import methods
from lilliput.anatomy.model import Anatomy, Linear
from lilliput.anatomy.tables import EMBED, HEAD
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known
from lilliput.parts.linear import divides
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import ScaleSpec
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target

GROUPS = (128, 64, 32)
OUTSIDE = -1  # the block of what is in none
_DECIDING = ("allocate", "search")  # verbs that give the steps behind them their targets
FISHER = "fisher"  # among a method's needs: no statistic of inputs, but of gradients


@dataclass(frozen=True)
class Task:
    """One step on one linear, with everything decided."""

    step: int
    method: methods.Method
    target: Target
    options: BaseModel

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the step reads with these options; a method may need fewer than it declares."""
        return self._reads - {FISHER}

    @property
    def fisher(self) -> bool:
        """Whether the step weighs by squared gradients of the whole model's loss."""
        return FISHER in self._reads

    @property
    def _reads(self) -> frozenset[str]:
        narrowed = getattr(self.method.module, "needs", None)
        return self.method.needs if narrowed is None else frozenset(narrowed(self.options))


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

    @property
    def alone(self) -> tuple[Task, ...]:
        """The steps that look at the linear by itself (or at its site)."""
        return tuple(task for task in self.tasks if task.method.verb == "compress")

    @property
    def together(self) -> tuple[Task, ...]:
        """The steps that fit it together with the rest of its block."""
        return tuple(task for task in self.tasks if task.method.verb == "fit")


@dataclass(frozen=True)
class Resolved:
    """All linears of all blocks, and the steps that work on more than one linear at a time."""

    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    rewrites: Mapping[int, tuple[Task, ...]]  # by block
    allocations: tuple[Task, ...]
    learned: tuple[Task, ...]
    needs: frozenset[str] = field(default=frozenset())  # statistics
    reads_tokens: bool = False  # whether any step looks at calibration samples
    tables: tuple[LinearPlan, ...] = ()  # the embedding and the head, where a step compresses them
    notes: tuple[str, ...] = ()  # what the model lacks

    @property
    def searches(self) -> tuple[Task, ...]:
        """Those of the allocations that decide by trying: by losses of the whole model."""
        return tuple(task for task in self.allocations if task.method.verb == "search")

    def of_block(self, block: int) -> tuple[LinearPlan, ...]:
        return tuple(x for x in self.linears if x.block == block)

    def fisher(self, samples: int) -> int:
        """How many of `samples` calibration samples the backward pass runs for squared gradients; 0: nobody reads
        them."""
        tasks = (*self.allocations, *(x for plan in self.linears for x in plan.tasks))
        asked = {x.step: x.options for x in tasks if x.fisher}
        counts = (getattr(options, "fisher_samples", None) for options in asked.values())
        return max((samples if count is None else min(count, samples) for count in counts), default=0)

    def squared(self) -> frozenset[str]:
        """The linears whose squared gradients some step reads."""
        dividing = [name for task in self.allocations if task.fisher for name in self.governed(task)]
        return frozenset(dividing) | {x.name for x in self.linears if any(task.fisher for task in x.tasks)}

    def governed(self, task: Task) -> dict[str, Task]:
        """By linear, the step whose target the allocation `task` decides: the next one that compresses it."""
        found: dict[str, Task] = {}
        for plan in self.linears:
            later = [x for x in plan.tasks if x.step > task.step]
            if later and matches(self.recipe.steps[task.step].where, plan.name, plan.linear):
                found[plan.name] = later[0]
        return found

    def quantized(self) -> dict[str, Target]:
        """By linear, the target of the step that quantizes it."""
        return {x.name: t.target for x in self.linears for t in x.tasks if t.method.writes == "quantized"}

    def with_targets(self, task: Task, targets: Mapping[str, Target]) -> Resolved:
        """What it becomes when `task` has decided. Raises LilliputError for a linear that it does not govern."""
        governed = self.governed(task)
        if targets.keys() - governed.keys():
            name = min(targets.keys() - governed.keys())
            raise LilliputError(f"{task.method.name} decided about {name}, which no later step compresses")

        return replace(
            self,
            linears=tuple(
                retargeted(x, governed[x.name], targets[x.name]) if x.name in targets else x for x in self.linears
            ),
        )


def retargeted(plan: LinearPlan, task: Task, target: Target) -> LinearPlan:
    """The linear when its step `task` has another target. Raises PlanError where the step cannot have it."""
    tasks = [replace(task, target=target) if x.step == task.step else x for x in plan.tasks]
    return _plan_linear(plan.name, plan.linear, plan.block, tasks)


def rotates(recipe: Recipe) -> bool:
    """Whether a step of the recipe learns a rotation of the residual stream."""
    return any(methods.get(step.method).verb == "learn" for step in recipe.steps)


def matches(where: Where, name: str, linear: Linear) -> bool:
    """Whether a step's `where` covers a linear: patterns may name it in full, within its block, shortly, or by role."""
    labels = (name, linear.name, linear.name.rsplit(".", 1)[-1], linear.role, *((HEAD,) if linear.also else ()))

    def hit(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns for label in labels)

    if linear.role in (EMBED, HEAD):  # only where they are named, which the default `exclude` does not undo
        named = [x for x in where.include if x != "*"]
        return hit(named) and not hit([x for x in where.exclude if x not in (EMBED, HEAD)])
    return hit(where.include) and not hit(where.exclude)


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


def _checked_order(steps: Sequence[tuple[Step, methods.Method]]) -> None:
    """Raises PlanError with the reason when the steps cannot follow each other."""
    touched: tuple[int, str] | None = None
    for number, (_, method) in enumerate(steps):
        at = f"step {number + 1} ({method.name})"
        if method.verb == "edit":
            raise PlanError(
                f"{at} changes the structure of the model: the transforms that it puts between blocks have no place in "
                "any layout that is written here; leave the step out"
            )
        if method.verb in {"objective", "cache"}:
            raise PlanError(f"{at}: methods of the family '{method.family}' cannot be run by a recipe yet")
        if method.verb == "learn" and any(earlier.verb != "learn" for _, earlier in steps[:number]):
            raise PlanError(
                f"{at} turns the whole model before any block is looked at: move it in front of "
                f"step {number} ({steps[number - 1][1].name})"
            )
        if method.verb in _DECIDING:
            if touched is not None:
                raise PlanError(
                    f"{at} divides the budget between layers, so it must come before {touched[1]} spends it"
                )
            continue
        if method.verb in {"rewrite", "learn"} and touched is not None:
            raise PlanError(
                f"{at} rescales or rotates weights, but {touched[1]} before it has already "
                "decided their values: move it to the front"
            )
        if method.verb in {"compress", "fit"}:
            touched = touched or (number, f"step {number + 1} ({method.name})")
    if all(x.verb in _DECIDING for _, x in steps):
        raise PlanError("the recipe only divides a budget: add a step that prunes or quantizes")


def _inherited(tasks: list[Task]) -> list[Task]:
    """A fit behind a step that quantizes works on that step's codes, and so on its target."""
    out: list[Task] = []
    for task in tasks:
        before = [x for x in out if x.method.writes == "quantized"]
        out.append(replace(task, target=before[-1].target) if task.method.verb == "fit" and before else task)
    return out


def _lost(scheme: Scheme, task: Task) -> str | None:
    """What the step reads that does not survive the transforms of the layer so far."""
    if task.fisher and (scheme.inputs or scheme.outputs):
        return "squared gradients"
    turned = any(not isinstance(x, ScaleSpec) for x in scheme.inputs)
    return "mean or largest absolute inputs" if turned and task.needs & {"absmean", "absmax"} else None


def _plan_linear(name: str, linear: Linear, block: int, tasks: list[Task]) -> LinearPlan:
    scheme = Scheme()
    quantized = False
    sparsity: float | None = None
    pattern: str | None = None
    tasks = _inherited(tasks)
    alone = next((x for x in tasks if x.method.replaces(x.options)), None)
    if alone is not None and len(tasks) > 1:
        other = next(x for x in tasks if x is not alone)
        raise PlanError(
            f"step {alone.step + 1} ({alone.method.name}) on {name} leaves a plain weight of its own: exclude "
            f"this layer from step {other.step + 1} ({other.method.name})"
        )
    for number, task in enumerate(tasks):
        label = f"step {task.step + 1} ({task.method.name}) on {name}"
        if number and tasks[number - 1].method.verb == "fit":
            last = tasks[number - 1]
            raise PlanError(
                f"{label}: step {last.step + 1} ({last.method.name}) fits this layer with its block once all other "
                "steps are done: make it the last one on this layer, and the only one of its family"
            )
        if task.method.writes == "support":
            if scheme.parts:
                raise PlanError(f"{label}: pruning after quantization would tear holes into fitted codes: prune first")
            if sparsity is not None:
                raise PlanError(f"{label}: an earlier step prunes this layer already; keep one of them")
            pattern, sparsity = task.target.pattern, task.target.sparsity
            if pattern is not None:
                n, _, m = pattern.partition(":")
                if linear.in_features % int(m):
                    raise PlanError(
                        f"{label}: the pattern {pattern} does not divide the width {linear.in_features}: "
                        "exclude this layer or use unstructured sparsity"
                    )
                sparsity = 1 - int(n) / int(m)
        else:
            if task.method.verb == "fit" and quantized:
                if (
                    scheme.parts[-1]
                    != task.method.scheme(task.target, task.options, linear.out_features, linear.in_features).parts[-1]
                ):
                    raise PlanError(
                        f"{label}: it fits the codes of an earlier step, whose last part is "
                        f"{scheme.parts[-1].describe()}: only integer codes at the end of a layer's parts can be fitted"
                    )
                continue
            if task.method.writes == "quantized" and quantized:
                raise PlanError(f"{label}: an earlier step quantizes this layer already; keep one of them")
            lost = _lost(scheme, task)
            if lost is not None:
                raise PlanError(
                    f"{label}: it reads {lost}, which are not known of a layer that an earlier step has turned "
                    f"({scheme.describe()}): choose another option, or leave one of the two steps out"
                )
            if sparsity is not None and not task.method.masked:
                raise PlanError(f"{label}: it would fill the zeros that an earlier step made: leave one of the two out")
            quantized = quantized or task.method.writes == "quantized"
            added = task.method.scheme(task.target, task.options, linear.out_features, linear.in_features)
            if (added.inputs or added.outputs) and (scheme.parts or sparsity is not None):
                raise PlanError(
                    f"{label}: it turns the weight, and an earlier step has already decided its parts or zeros: "
                    "move it to the front"
                )
            if sparsity is not None and added.fills:
                raise PlanError(
                    f"{label}: {added.describe()} reaches every weight, so an earlier step's zeros would not stay: "
                    "leave one of the two steps out"
                )
            scheme = Scheme(
                (*scheme.parts, *added.parts), (*scheme.inputs, *added.inputs), (*scheme.outputs, *added.outputs)
            )
    return LinearPlan(block, linear, name, tuple(tasks), scheme, sparsity, pattern)


def _plan_table(table: Linear, tasks: list[Task]) -> LinearPlan:
    """What happens to the embedding or the head, which is compressed a few rows at a time: it may be the largest tensor
    of all. Raises PlanError for steps that look at more than single rows of it."""
    plan = _plan_linear(table.name, table, OUTSIDE, tasks)
    for task in tasks:
        label = f"step {task.step + 1} ({task.method.name}) on {table.name}"
        if not task.method.rowwise or task.fisher:
            raise PlanError(
                f"{label}: an embedding or head is compressed row by row, and this method looks at the whole matrix"
                f"{' and at squared gradients' if task.fisher else ''}: give it to rtn or gptq, or leave it out"
            )
        if task.method.writes != "quantized" or len(tasks) > 1:
            raise PlanError(f"{label}: an embedding or head takes one step, which quantizes it: leave it out of others")
    if not divides(plan.scheme, table.out_features, table.in_features):
        raise PlanError(
            f"step {tasks[0].step + 1} ({tasks[0].method.name}) on {table.name}: the rows of {plan.scheme.describe()} "
            "cannot be read one by one, as an embedding's have to be: choose a group_size, 'channel', or another format"
        )
    return plan


def resolve(
    recipe: Recipe,
    anatomy: Anatomy,
    scale_dtype: torch.dtype,
    only: int | None = None,
    *,
    width: int = 0,
    tables: Sequence[Linear] = (),
) -> Resolved:
    """Decide everything about a recipe on a model. Raises PlanError for every mistake that a user can make in it.

    `only` restricts the work to the first so many blocks (the rest stays as it is); the decisions do not depend on it.
    `width` is that of the residual stream, for methods that rotate it; `tables` are the embedding and the head.
    """
    steps = [(step, methods.get(step.method)) for step in recipe.steps]
    parsed = [method.parse(step.options) for step, method in steps]
    _checked_order(steps)
    everything = [
        (number, f"{prefix}.{linear.name}", linear)
        for number, (prefix, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True))
        for linear in block.linears
    ]
    targets: list[Target] = []
    idle: list[str] = []
    for number, (step, method) in enumerate(steps):
        target = step.target
        if method.verb in {"rewrite", "learn"} and target.bits is None:
            # A rewrite prepares for whoever quantizes after it, so it takes that step's target.
            later = [s.target for s, m in steps[number + 1 :] if m.writes == "quantized"]
            target = later[0] if later else target
        try:
            target = known.completed(target)
        except PlanError as error:
            raise PlanError(f"step {number + 1} ({method.name}): {error}") from None
        if target.bits is None and (method.writes == "quantized" or method.verb in {"rewrite", "learn"}):
            target = target.model_copy(update={"bits": 4})
        if method.writes == "support" and target.pattern is None and target.sparsity is None:
            target = target.model_copy(update={"sparsity": 0.5})
        target = method.completed(target)
        chosen = [x for _, name, x in everything if matches(step.where, name, x)]
        chosen += [x for x in tables if method.verb == "compress" and matches(step.where, x.name, x)]
        if not chosen and not tables and set(step.where.include) <= {EMBED, HEAD}:
            idle.append(
                f"step {number + 1} ({method.name}) does nothing: {anatomy.architecture} has no plain embedding or "
                "head."
            )
            targets.append(target)
            continue
        if not chosen:
            raise PlanError(
                f"step {number + 1} ({method.name}) applies to no layer: 'where' includes {list(step.where.include)} "
                f"and excludes {list(step.where.exclude)}; layers are called like {everything[0][1]}"
            )
        group = _group(target, sorted({x.in_features for x in chosen}), f"step {number + 1} ({step.method})")
        scales = str(scale_dtype).removeprefix("torch.") if target.scale_dtype == "auto" else target.scale_dtype
        targets.append(target.model_copy(update={"group_size": group, "scale_dtype": scales}))
    tasks = [Task(n, m, targets[n], parsed[n]) for n, (_, m) in enumerate(steps)]

    plans: list[LinearPlan] = []
    for block, name, linear in everything:
        mine = [
            task
            for task, (step, method) in zip(tasks, steps, strict=True)
            if method.verb in {"compress", "fit"} and matches(step.where, name, linear)
        ]
        for task, after in zip(mine, _inherited(mine), strict=True):
            asked = steps[task.step][0].target
            stated = {key: getattr(task.target, key) for key in asked.model_fields_set}
            if any(getattr(after.target, key) != value for key, value in stated.items()):
                raise PlanError(
                    f"step {task.step + 1} ({task.method.name}) on {name} fits the codes of an earlier step, which has "
                    "another target: leave the target of this step out"
                )
        plan = _plan_linear(name, linear, block, mine)
        plans.append(plan if only is None or block < only else replace(plan, tasks=(), scheme=Scheme(), sparsity=None))
    outside = []
    for table in tables:
        mine = [
            task
            for task, (step, method) in zip(tasks, steps, strict=True)
            if method.verb == "compress" and matches(step.where, table.name, table)
        ]
        if mine:
            outside.append(_plan_table(table, mine))
    rewriting = tuple(task for task in tasks if task.method.verb == "rewrite")
    if rewriting and not any(block.links for block in anatomy.blocks):
        raise PlanError(
            f"step {rewriting[0].step + 1} ({rewriting[0].method.name}) moves scales along verified links, but none "
            f"was found in {anatomy.architecture}: leave the step out"
        )
    count = len(anatomy.blocks) if only is None else only
    resolved = Resolved(
        recipe=recipe,
        linears=tuple(plans),
        rewrites=dict.fromkeys(range(count), rewriting) if rewriting else {},
        allocations=tuple(task for task in tasks if task.method.verb in _DECIDING),
        learned=tuple(task for task in tasks if task.method.verb == "learn"),
        needs=frozenset().union(*(task.needs for task in tasks)),
        tables=tuple(outside),
        notes=tuple(idle),
        reads_tokens=any(task.needs or task.fisher or getattr(task.method.module, "TOKENS", False) for task in tasks),
    )
    _refused(resolved, width)
    return resolved


def _refused(resolved: Resolved, width: int) -> None:
    """Raises PlanError where a method says that it cannot do what its step asks for on this model."""
    for task in (*resolved.allocations, *resolved.learned):
        at = f"step {task.step + 1} ({task.method.name})"
        refuse = getattr(task.method.module, "refuse", None)
        reasons: list[str | None] = []
        if task.method.verb == "learn":
            reasons = [refuse(width, resolved.quantized(), task.options)] if refuse else []
        else:
            governed = resolved.governed(task)
            targets = {x.target for x in governed.values()}
            if not targets:
                raise PlanError(f"{at} divides a budget, but no step behind it compresses the layers that it covers")
            if task in resolved.searches:
                reasons = [task.method.cannot_try(x.method, x.options) for x in governed.values()]
                reasons += [
                    f"it tries out weights as the model has them, and step {x.step + 1} ({x.method.name}) changes them "
                    "too: leave one of the two out"
                    for x in (*resolved.rewrites.get(0, ()), *resolved.searches)
                    if x is not task
                ]
            reasons += [refuse(target, task.options) for target in targets] if refuse else []
        for reason in filter(None, reasons):
            raise PlanError(f"{at}: {reason}")


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, in a fixed order."""
    return recipe.model_dump(mode="json")
