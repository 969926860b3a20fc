"""The verb `learn`: what is chosen for the whole model, before any block is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lilliput.errors import PlanError
from lilliput.folds.kinds import HeadRotations, ResidualRotation
from lilliput.machine.cost import Cost, Phase
from lilliput.streaming import peak
from lilliput.streaming.backward import Samples
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import order
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes

if TYPE_CHECKING:
    from lilliput.model.rotated import RotatedModel  # which imports transformers


@dataclass(frozen=True, kw_only=True)
class Learn(Spec[OptionsT]):
    """`run(model, samples, targets, options)`: rotations of the residual stream, and of heads of values, in the order
    in which they are applied; `targets` says what later steps will make of each linear.

    `sequences(options, samples)`: how many of the calibration samples its loss is taken over, of so many (None: it
    looks at none, and `samples` is None); `refuse(around, options)`: why it cannot rotate the residual stream of such a
    model before such steps. While it runs, linears round their inputs as later steps will have them, where scales are
    found at run time.
    """

    verb: ClassVar[str] = "learn"
    family: ClassVar[str] = "learn"
    stage: ClassVar[Stage] = Stage.MODEL
    prepares: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    run: Callable[
        [RotatedModel, Samples | None, Mapping[str, Target], OptionsT], Sequence[ResidualRotation | HeadRotations]
    ]
    sequences: Callable[[OptionsT, int], int] | None = None
    refuse: Callable[[Around, OptionsT], str | None] | None = None
    writes: Writes = "fold"

    def tokens(self, options: OptionsT) -> bool:
        return self.sequences is not None

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        turning = Cost(ram=5 * peak.of_rotation(run).ram)
        phases = (Phase("turning the model", turning),)
        if not self.tokens(options):
            return phases
        return (*phases, Phase("learning a rotation", turning + peak.of_gradients(run)))

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        before = recipe[: task.step]
        if any(x.spec.stage is not Stage.MODEL for x in before):
            raise PlanError(
                f"{task.label} turns the whole model before any block is looked at: move it in front of "
                f"{before[-1].label}"
            )
        order.before_values(task, recipe)

    def suits(self, task: Task, around: Around) -> None:
        reason = self.refuse and self.refuse(around, self.options_of(task))
        if reason:
            raise PlanError(f"{task.label}: {reason}")
