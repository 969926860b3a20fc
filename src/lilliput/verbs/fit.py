"""The verb `fit`: the linears of a block together, by what the block makes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.formats.known import from_target
from lilliput.machine.cost import Cost, Phase
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import draft as drafts
from lilliput.verbs import order
from lilliput.verbs.draft import Draft
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.view import BlockFit, FitBlock, FitIO


@dataclass(frozen=True, kw_only=True)
class Fit(Spec[OptionsT]):
    """`run(block, io, targets, options)`: the layers of a block fitted together, and its loss before and after.

    It is the last step on a linear. After a step that quantizes it continues from that step's codes, and so has its
    target; one whose `writes` is "support" trains the weights that a pruning step has kept, and quantizes nothing.
    `copies`: float32 copies of a block's weights that it holds at once; `looks(options, samples)`: samples that all its
    steps of descent look at, of so many; `moving(options)`: whether it folds something into norms and linears.
    """

    verb: ClassVar[str] = "fit"
    family: ClassVar[str] = "fit"
    single: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.CLOSE
    settles: ClassVar[bool] = True

    run: Callable[[FitBlock, FitIO, Mapping[str, Target], OptionsT], BlockFit]
    copies: int
    looks: Callable[[OptionsT, int], int]
    writes: Writes = "quantized"
    masked: bool = True
    moving: Callable[[OptionsT], bool] = lambda options: False

    def folds(self, options: OptionsT) -> bool:
        return self.moving(options)

    def scheme_of(self, target: Target, options: OptionsT, rows: int, width: int) -> Scheme:
        if self.writes != "quantized":
            return Scheme()
        return Scheme((QuantizedSpec(from_target(target)),))

    def inherited(self, task: Task, before: Sequence[Task], asked: Target | None, name: str) -> Target:
        earlier = [x for x in before if x.spec.writes == self.writes]
        if not earlier:
            return task.target
        what = "codes" if self.writes == "quantized" else "weights"
        return order.same_target(task, earlier[-1], asked, name, f"fits the {what} of an earlier step")

    def drafted(self, task: Task, later: Sequence[Task], name: str, linear: Linear, draft: Draft) -> Draft:
        label = f"{task.label} on {name}"
        if self.writes == "support":
            result = drafts.refined(label, draft)
        elif draft.quantized:
            own = task.method.scheme(task.target, task.options, linear.out_features, linear.in_features)
            if draft.scheme.parts[-1] != own.parts[-1]:
                raise PlanError(
                    f"{label}: it fits the codes of an earlier step, whose last part is "
                    f"{draft.scheme.parts[-1].describe()}: only integer codes at the end of a layer's parts can be "
                    "fitted"
                )
            result = draft
        else:
            drafts.check_statistics(label, draft, task.needs, task.fisher)
            drafts.unmasked(label, draft, self.masked)
            added = task.method.scheme(task.target, task.options, linear.out_features, linear.in_features)
            result = drafts.extended(label, draft, added, True)
        if later:
            raise PlanError(
                f"{later[0].label} on {name}: {task.label} fits this layer with its block once all other "
                "steps are done: make it the last one on this layer, and the only one of its family"
            )
        return result

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        # Three products a weight and token for each step, and three passes that only look.
        samples = self.looks(options, run.samples) * 3 + 3 * run.samples
        return Cost(operations=samples * run.tokens * sum(x.parameters for x in linears))

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        """A block: its weights in all their copies, and what a batch leaves for the way back."""
        ram = 0
        for block in run.kinds:
            weights = sum(x.parameters for x in block.linears)
            largest = max(x.parameters for x in block.linears)
            wide = sum(x.out_features for x in block.linears) + sum(site.width for site in block.sites)
            token = 4 * 8 * run.hidden + run.itemsize * wide
            copies = weights * (4 * self.copies + 2 * run.itemsize)
            ram = max(ram, copies + 16 * largest + run.batch * run.tokens * token)
        return (Phase("fitting a block", Cost(ram=ram)),)
