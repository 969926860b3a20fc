"""The verb `allocate`: who gets how much of a budget, by scores that are taken block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.machine.cost import Cost
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import order
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.view import BlockIO, BlockView


@dataclass(frozen=True, kw_only=True)
class Allocate(Spec[OptionsT]):
    """`score(block, io, options)`: what each linear of a block would lose; `run(scores, budget, options)`: the targets
    of the step after it, whose own target is the average to keep.

    `refuse(target, options)`: why that step's target cannot be divided; `extremes(target, options)`: the targets
    farthest apart that linears with this one may get, where layouts have to hold both (None: sizes stay); `double`: it
    decomposes weights in float64.
    """

    verb: ClassVar[str] = "allocate"
    family: ClassVar[str] = "allocate"
    stage: ClassVar[Stage] = Stage.TARGETS

    score: Callable[[BlockView, BlockIO, OptionsT], Scores]
    run: Callable[[Scores, Budget, OptionsT], Mapping[str, Target]]
    refuse: Callable[[Target, OptionsT], str | None] | None = None
    extremes: Callable[[Target, OptionsT], tuple[Target, ...]] | None = None
    double: bool = False
    writes: Writes = "targets"

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        order.before_spending(task, recipe)

    def suits(self, task: Task, around: Around) -> None:
        order.governing(task, around)
        order.divisible(task, around, self.refuse)

    def farthest(self, target: Target, options: OptionsT) -> tuple[Target, ...]:
        return () if self.extremes is None else self.extremes(target, options)

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        return peak.of_decomposing(linears) if self.double else Cost()
