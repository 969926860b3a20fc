"""The verb `rewrite`: a block that computes what it did, with weights that are easier to compress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lilliput.anatomy.model import Anatomy, Linear
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
    the block's weights and statistics (None: no more than a copy of the largest linear); `moves`: what it returns:
    scales (and shifts) along links, orders of hidden channels, or rotations of heads; `refuse(anatomy, options)`: why
    it cannot do so on this model."""

    verb: ClassVar[str] = "rewrite"
    family: ClassVar[str] = "rewrite"
    stage: ClassVar[Stage] = Stage.BLOCK
    prepares: ClassVar[bool] = True

    run: Callable[[BlockView, BlockIO, Target, OptionsT], Sequence[Fold]]
    takes: Callable[[Run, Sequence[Linear], OptionsT], Cost] | None = None
    moves: Literal["scales", "channels", "heads"] = "scales"
    refuse: Callable[[Anatomy, OptionsT], str | None] | None = None
    writes: Writes = "fold"

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """Copies of all weights in float32, and what it works in."""
        copies = Cost(ram=4 * (sum(x.parameters for x in linears) + max(x.parameters for x in linears)))
        return copies if self.takes is None else copies + self.takes(run, linears, options)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        order.before_values(task, recipe)

    def suits(self, task: Task, around: Around) -> None:
        blocks, what = around.anatomy.blocks, around.anatomy.architecture
        if self.moves == "channels" and not any(block.groups.channels for block in blocks):
            raise PlanError(
                f"{task.label} changes the order of hidden channels, but none could be told apart in {what}: leave the "
                "step out"
            )
        if self.moves == "heads" and not any(link.head for block in blocks for link in block.links):
            raise PlanError(
                f"{task.label} rotates the heads of values, but none that may be turned was found in {what}: leave the "
                "step out"
            )
        if self.moves == "heads" and (reading := next((x for x in around.recipe if x.fisher), None)) is not None:
            raise PlanError(
                f"{reading.label} reads squared gradients by single weights, which do not survive the rotation of "
                f"{task.label}: leave one of the two out"
            )
        if self.moves == "scales" and not any(block.links for block in blocks):
            raise PlanError(
                f"{task.label} moves scales along verified links, but none was found in {what}: leave the step out"
            )
        reason = self.refuse and self.refuse(around.anatomy, self.options_of(task))
        if reason:
            raise PlanError(f"{task.label}: {reason}")
