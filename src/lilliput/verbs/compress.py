"""The verb `compress`: one linear, or several that share their inputs, rows below each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.formats.known import from_target
from lilliput.machine.cost import Cost
from lilliput.parts.kept import spec_of
from lilliput.parts.layer import Layer
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import draft as drafts
from lilliput.verbs import order
from lilliput.verbs.draft import Draft
from lilliput.verbs.spec import FISHER, OptionsT, Spec, Stage, Task


@dataclass(frozen=True, kw_only=True)
class Compress(Spec[OptionsT]):
    """`run(layer, stats, target, options)`: the layer with a part or a support more. It never changes its arguments,
    never writes outside `layer.support`, and fits `layer.rest()`.

    `writes`: "quantized" (codes on the target's grid), "parts" (others, or several) or "support"; `scheme(target,
    options, rows, width)`: what it adds where that is not one part on the target's grid, exact, before a weight is
    read; `rowwise`: each output row is treated by itself, so linears of one site may be stacked, but for the targets
    and options that `mixes` names; `refines`: it writes a support, and needs one that an earlier step has chosen, whose
    target it has; `masked`: it keeps the zeros of a pruned linear; `compensates`: it fills them with a further part,
    beside the kept weights or codes, and is shown the layer without a support; `kept(target, options, rows, width)`:
    how many weights a step that prunes keeps, exact (None: not known before it has chosen, and its zeros are stored);
    `replaces(options)`: it leaves a plain weight
    of its own, which no other step may touch; `double`: it decomposes weights in float64; `scratch`: bytes that it
    works in beyond a few copies of the weights and the Gram matrix, whatever their shapes; `sweeps(options)`: how
    often it rounds every weight (None: once); `prunes`: one that quantizes prunes first where its target has a pattern;
    `roles(options)`: the roles of the linears that it works on (None: all).
    """

    verb: ClassVar[str] = "compress"
    family: ClassVar[str] = "weight"
    stage: ClassVar[Stage] = Stage.LINEAR
    settles: ClassVar[bool] = True

    run: Callable[[Layer, SiteStats, Target, OptionsT], Layer]
    scheme: Callable[[Target, OptionsT, int, int], Scheme] | None = None
    rowwise: bool = False
    mixes: Callable[[Target, OptionsT], bool] | None = None
    refines: bool = False
    masked: bool = True
    compensates: bool = False
    kept: Callable[[Target, OptionsT, int, int], int] | None = None
    replaces: Callable[[OptionsT], bool] | None = None
    double: bool = False
    scratch: int = 0
    sweeps: Callable[[OptionsT], int] | None = None
    prunes: bool = False
    roles: Callable[[OptionsT], Collection[str]] | None = None

    def works_on(self, linear: Linear, options: OptionsT) -> bool:
        return self.roles is None or linear.role in self.roles(options)

    def stacks(self, target: Target, options: OptionsT) -> bool:
        """Where each row is treated by itself."""
        return self.rowwise and not (self.mixes is not None and self.mixes(target, options))

    def tabular(self) -> bool:
        return self.rowwise and self.writes == "quantized"

    def plain(self, options: OptionsT) -> bool:
        return self.replaces is not None and self.replaces(options)

    def scheme_of(self, target: Target, options: OptionsT, rows: int, width: int) -> Scheme:
        if self.scheme is not None:
            return self.scheme(target, options, rows, width)
        return Scheme((QuantizedSpec(from_target(target)),)) if self.writes == "quantized" else Scheme()

    def accompanied(self, task: Task, tasks: Sequence[Task], name: str) -> None:
        if len(tasks) > 1 and self.plain(self.options_of(task)):
            other = next(x for x in tasks if x is not task)
            raise PlanError(
                f"{task.label} on {name} leaves a plain weight of its own: exclude this layer from {other.label}"
            )

    def inherited(self, task: Task, before: Sequence[Task], asked: Target | None, name: str) -> Target:
        pruning = [x for x in before if x.spec.writes == "support"]
        if not self.refines or not pruning:
            return task.target
        return order.same_target(task, pruning[-1], asked, name, f"refines the zeros of {pruning[-1].label}")

    def drafted(self, task: Task, later: Sequence[Task], name: str, linear: Linear, draft: Draft) -> Draft:
        label = f"{task.label} on {name}"
        if self.writes == "support":
            drafts.check_statistics(label, draft, task.needs, task.fisher)
            if self.refines:
                return drafts.refined(label, draft)
            shape, options = (linear.out_features, linear.in_features), self.options_of(task)
            count = None if self.kept is None else self.kept(task.target, options, *shape)
            return drafts.pruned(label, draft, task.target, linear.in_features, count)
        if self.writes == "quantized":
            drafts.once(label, draft)
            if self.prunes and task.target.pattern is not None:
                draft = drafts.pruned(label, draft, task.target, linear.in_features, None)
        drafts.check_statistics(label, draft, task.needs, task.fisher)
        if self.compensates:
            draft = drafts.opened(draft, task.first)
        drafts.unmasked(label, draft, self.masked)
        added = task.method.scheme(task.target, task.options, linear.out_features, linear.in_features)
        return drafts.extended(label, draft, added, self.writes == "quantized")

    def opens(self, draft: Draft, linear: Linear) -> PartSpec | None:
        if not self.compensates or draft.sparsity is None or draft.scheme.parts:
            return None
        shape = linear.out_features, linear.in_features
        return spec_of(*shape, draft.dtype, draft.pattern, draft.kept, draft.places)

    def rounds(self, options: OptionsT) -> int:
        return 1 if self.sweeps is None else self.sweeps(options)

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        reads = self.read(options)
        solving = peak.of_solving(linears, gram="gram" in reads, squares=FISHER in reads)
        return (solving.then(peak.of_decomposing(linears)) if self.double else solving) + Cost(ram=self.scratch)
