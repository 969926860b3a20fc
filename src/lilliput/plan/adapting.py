"""A step that trains an adapter, in a plan: what cannot have one, and the bytes of a base that stays packed."""

from __future__ import annotations

import math
from typing import Any

from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.model.weights import Model
from lilliput.plan.resolve import LinearPlan, Resolved, matches
from lilliput.recipe.schema import Where
from lilliput.streaming.peak import Run
from lilliput.training import borrowed
from lilliput.training.student import LOGITS
from lilliput.verbs.adapt import Adapt, settings
from lilliput.verbs.objective import Objective
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import kept


def covered(resolved: Resolved, task: Task) -> tuple[LinearPlan, ...]:
    """The linears beside which a step trains something."""
    where = resolved.recipe.steps[task.step].where
    own = (x for x in resolved.linears if matches(where, x.name, x.linear))
    return tuple(x for x in own if task.spec.works_on(x.linear, task.options))


def check(
    resolved: Resolved, task: Task, model: Model, teacher: Model | None, objective: Objective[Any], options: Any
) -> None:
    """Raises PlanError for a step whose adapter this model, objective or machine cannot have."""
    spec = task.of(Adapt)
    if spec.borrows:
        borrowed.peft()
    reason = spec.refuses(model.skeleton.config, task.options)
    if reason is not None:
        raise PlanError(f"{task.label}: {reason}")
    linears = covered(resolved, task)
    spec.suits_all(task, {x.name: (x.linear, x.scheme) for x in linears})
    if not spec.covering and resolved.recipe.steps[task.step].where != Where():
        raise PlanError(f"{task.label} is about the whole model, and no linears: leave `where` out")
    if model.source.config is not model.source.text_config:
        raise PlanError(
            f"{task.label}: {model.source.model} is a language model inside another one, in which peft would look for "
            "the adapter elsewhere: give the folder of its language model alone"
        )
    experts = [x.name for x in linears if x.linear.expert is not None] if spec.covering else []
    if experts and resolved.recipe.export != "lilliput":
        raise PlanError(
            f"{task.label} on {experts[0]}: transformers holds the experts of a layer as one tensor, in which an "
            "adapter has no place: leave them out with where: {exclude: ['*experts*', lm_head, router]}, or compress "
            "them and set `export: lilliput`, which keeps them apart"
        )
    plain = [x.name for x in linears if x.linear.expert is not None and not x.scheme.parts] if spec.covering else []
    if plain:
        raise PlanError(
            f"{task.label} on {plain[0]}: transformers holds experts that are not compressed as one tensor, in which "
            "an adapter has no place: leave them out with where: {exclude: ['*experts*', lm_head, router]}"
        )
    if lengthening(task) and objective.beside(options):
        raise PlanError(
            f"{task.label} adds positions in front of the text, so that what student and teacher show cannot be "
            "compared, nor the student write: take an objective on distributions, such as logit-kd"
        )
    if lengthening(task) and (resolved.at(Stage.CACHE) or model.source.caches):
        raise PlanError(
            f"{task.label} adds positions in front of the text, which a compressed cache does not tell from the text: "
            "leave the step for the cache out, or train a `lora`"
        )
    if spec.restarts(task.options) is not None:
        original(task, model, teacher, linears)


def original(task: Task, model: Model, teacher: Model | None, linears: tuple[LinearPlan, ...]) -> None:
    """Raises PlanError where weights before compression are read, and no model is known that has them."""
    if teacher is None and model.source.quantization is not None:
        raise PlanError(
            f"{task.label} begins at what {model.source.model} has lost, and the original is not known: name it with "
            "--teacher"
        )
    if teacher is None:
        return
    for x in linears:
        name = f"{x.name}.weight"
        shape = teacher.shape(name) if name in teacher.refs else None
        if shape != model.shape(name):
            raise PlanError(
                f"{task.label} reads the weight that {x.name} had in the original, and in {teacher.source.model} it is "
                f"{'not there' if shape is None else list(shape)}: name the model that the folder was made of with "
                "--teacher, or have the step begin at what the folder holds (`start`)"
            )


def lengthening(task: Task) -> int:
    """How many positions a step adds in front of the text."""
    spec = task.spec
    return spec.adds(task.options) if isinstance(spec, Adapt) else 0


def numbers(resolved: Resolved, task: Task, run: Run) -> int:
    """How many numbers an adapter has."""
    spec, linears = task.of(Adapt), [x.linear for x in covered(resolved, task)]
    return spec.parameters(linears, task.target, task.options) + spec.fixed(run.hidden, len(run.blocks), task.options)


def written(resolved: Resolved, run: Run) -> int:
    """Bytes of the adapters' folders, at most: factors in float32, and names."""
    tasks = [task for task in resolved.at(Stage.TRAINING) if isinstance(task.spec, Adapt)]
    return sum(4 * numbers(resolved, x, run) + 500 * len(covered(resolved, x)) + 5_000 for x in tasks)


def phase(resolved: Resolved, task: Task, run: Run, model: Model) -> Phase:
    """The folder as it is packed, one linear decoded, the adapter with its gradients and moments, and what a sample
    leaves for the way back: the inputs of all blocks and one block's inner values, or all blocks' without
    checkpointing, and logits a few at a time. Or, before the first step, a linear beside what it was, decomposed."""
    o = settings(task.options)
    packed = {x.name: x for x in resolved.linears if x.scheme.parts}
    base = sum(-(-x.scheme.size_bits(*_shape(x)) // 8) for x in packed.values())
    base += sum(
        math.prod(shape) * run.itemsize
        for name, shape in model.skeleton.shapes.items()
        if name.removesuffix(".weight") not in packed
    )
    decoding = max((math.prod(_shape(x)) for x in packed.values()), default=0) * (4 + 2 * run.itemsize)
    each = kept(run)
    token = len(each) * run.hidden + 3 * max(each) if o.checkpointing else sum(each)
    rows = (o.at_once or 1) * o.tokens
    # Scores of attention, a head at a time each way, and logits with their gradients.
    own = 4 * rows * token + 4 * 3 * min(rows * run.vocabulary, max(LOGITS, run.vocabulary))
    trained = numbers(resolved, task, run) * 4 * (2 if o.optimizer == "paged" else 4)
    largest = max((math.prod(_shape(x)) for x in covered(resolved, task)), default=0)
    beginning = 40 * largest if task.of(Adapt).restarts(task.options) is not None else 0
    return Phase("training an adapter", Cost(ram=base + max(decoding + own + trained, beginning + trained)))


def _shape(x: LinearPlan) -> tuple[int, int]:
    return x.linear.out_features, x.linear.in_features
