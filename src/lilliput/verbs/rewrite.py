"""The verb `rewrite`: a block that computes what it did, with weights that are easier to compress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.folds.kinds import Fold
from lilliput.machine.cost import Cost
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import order
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.view import BlockIO, BlockView


@dataclass(frozen=True, kw_only=True)
class Rewrite(Spec[OptionsT]):
    """`run(block, io, target, options)`: folds that leave the block's function as it is. `target` is that of the step
    that quantizes later, unless the step names its own bits. `takes(run, linears, options)`: what it works in beside
    the block's weights and statistics (None: no more than a copy of the largest linear); `permutes`: it changes the
    order of hidden channels and moves no scales."""

    verb: ClassVar[str] = "rewrite"
    family: ClassVar[str] = "rewrite"
    stage: ClassVar[Stage] = Stage.BLOCK
    prepares: ClassVar[bool] = True

    run: Callable[[BlockView, BlockIO, Target, OptionsT], Sequence[Fold]]
    takes: Callable[[Run, Sequence[Linear], OptionsT], Cost] | None = None
    permutes: bool = False
    writes: Writes = "fold"

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """Copies of all weights in float32, and what it works in."""
        copies = Cost(ram=4 * (sum(x.parameters for x in linears) + max(x.parameters for x in linears)))
        return copies if self.takes is None else copies + self.takes(run, linears, options)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        order.before_values(task, recipe)

    def suits(self, task: Task, around: Around) -> None:
        if self.permutes:
            if not any(block.groups.channels for block in around.anatomy.blocks):
                raise PlanError(
                    f"{task.label} changes the order of hidden channels, but none could be told apart in "
                    f"{around.anatomy.architecture}: leave the step out"
                )
        elif not any(block.links for block in around.anatomy.blocks):
            raise PlanError(
                f"{task.label} moves scales along verified links, but none "
                f"was found in {around.anatomy.architecture}: leave the step out"
            )
