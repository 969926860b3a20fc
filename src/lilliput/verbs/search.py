"""The verb `search`: who gets how much of a budget, where only trying tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import order
from lilliput.verbs.scores import Budget, Loss
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True, kw_only=True)
class Search(Spec[OptionsT]):
    """`run(loss, budget, options)`: the targets of the step after it, and the finding in words.

    `governs`: names of the methods that it tries out; `keeps_budget`: whatever it decides takes no more bytes than the
    recipe's targets; `refuse(target, options)`: why that step's target cannot be searched; `looked_at(samples,
    options)`: how many of so many calibration samples the losses are taken over; `passes(linears, options)`: forward
    passes through all blocks that trying so many linears amounts to.
    """

    verb: ClassVar[str] = "search"
    family: ClassVar[str] = "search"
    stage: ClassVar[Stage] = Stage.TARGETS

    run: Callable[[Loss, Budget, OptionsT], tuple[Mapping[str, Target], str]]
    governs: tuple[str, ...]
    looked_at: Callable[[int, OptionsT], int]
    passes: Callable[[int, OptionsT], float]
    keeps_budget: bool = False
    refuse: Callable[[Target, OptionsT], str | None] | None = None
    writes: Writes = "targets"

    def tokens(self, options: OptionsT) -> bool:
        return True

    def observes(self, governed: Sequence[Task]) -> bool:
        return any(x.needs for x in governed)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        order.before_spending(task, recipe)

    def suits(self, task: Task, around: Around) -> None:
        order.governing(task, around)
        for other in around.governed.values():
            reason = self._cannot_try(other)
            if reason is not None:
                raise PlanError(f"{task.label}: {reason}")
        for other in around.recipe:
            changes = other.spec.stage is Stage.BLOCK or other.spec.verb == self.verb
            if changes and other is not task:
                raise PlanError(
                    f"{task.label}: it tries out weights as the model has them, and {other.label} changes them "
                    "too: leave one of the two out"
                )
        order.divisible(task, around, self.refuse)

    def _cannot_try(self, other: Task) -> str | None:
        """Why a step cannot be tried out before anything else of it is known."""
        name = other.method.name
        if name not in self.governs:
            return (
                f"it tries out {' or '.join(self.governs)}, not '{name}': put that step after it, and restrict "
                "'where' of this step to its layers"
            )
        if other.fisher:
            return (
                f"layers are tried out before squared gradients are known, and the step of '{name}' weighs by "
                "them: give it another weighting, or leave this step out"
            )
        # Where the decision keeps to the bytes of the recipe's targets, parts may be of any size.
        if not other.spec.plain(other.options) and not self.keeps_budget:
            return (
                f"which layers the step of '{name}' changes is known too late for the size to depend on it: let "
                "it leave plain weights (factored=false)"
            )
        return None

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        samples = self.passes(len(linears), options) * self.looked_at(run.samples, options)
        return Cost(operations=3.0 * run.weights * samples * run.tokens)

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        making = max(peak.of_decomposing(block.linears).ram for block in run.kinds)
        return (Phase("trying out candidates", peak.of_loss(run, making)),)
