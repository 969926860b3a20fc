"""The verb `inputs`: how what enters a linear is rounded while the model runs, beside whatever its weights become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.formats import known
from lilliput.machine.cost import Cost
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.layer import Layer
from lilliput.parts.reassembled import ReassembledSpec
from lilliput.stats.site import SiteStats
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import draft as drafts
from lilliput.verbs.draft import Draft
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True, kw_only=True)
class Inputs(Spec[OptionsT]):
    """`run(layer, stats, target, options)`: the grid for what the layer's input transforms give, whose statistics
    `stats` are. It changes no weight.

    `spec(target, options, width)`: the same without the values that text decides, known to the plan. The rest of the
    block, and all blocks behind it, see what the rounded inputs give. `besides(target)`: statistics that it reads with
    this target, whatever the options are.
    """

    verb: ClassVar[str] = "inputs"
    family: ClassVar[str] = "inputs"
    stage: ClassVar[Stage] = Stage.LINEAR

    run: Callable[[Layer, SiteStats, Target, OptionsT], InputGrid]
    spec: Callable[[Target, OptionsT, int], InputSpec]
    besides: Callable[[Target], tuple[str, ...]] | None = None
    writes: Writes = "inputs"

    def needed(self, target: Target, options: OptionsT) -> frozenset[str]:
        return self.read(options) | frozenset(() if self.besides is None else self.besides(target))

    def completed(self, target: Target) -> Target:
        """8 bits where the target names none, all inputs of a token ("channel") where it names no group, and the
        method's own format where it names none."""
        form = self.default.get("format")
        if form is not None and "format" not in target.model_fields_set:
            target = known.completed(target.model_copy(update={"format": form}))
        named = target.model_dump(exclude_none=True).keys() - ({"group_size"} if target.group_size == "auto" else set())
        added = {"bits": 8, "group_size": "channel", **self.default}
        return target.model_copy(update={key: value for key, value in added.items() if key not in named})

    def stacks(self, target: Target, options: OptionsT) -> bool:
        """All linears of a site read the same."""
        return True

    def drafted(self, task: Task, later: Sequence[Task], name: str, linear: Linear, draft: Draft) -> Draft:
        label = f"{task.label} on {name}"
        if draft.scheme.activation is not None:
            raise PlanError(f"{label}: an earlier step rounds the inputs of this layer already; keep one of them")
        if any(x.spec.stage is Stage.LINEAR and x.spec.writes != "inputs" for x in later):
            other = next(x for x in later if x.spec.stage is Stage.LINEAR and x.spec.writes != "inputs")
            raise PlanError(
                f"{label}: {other.label} would still change what its inputs meet; put the rounding of inputs behind it"
            )
        if self.formats is not None and task.target.format not in self.formats:
            raise PlanError(
                f"{label}: its inputs cannot have format '{task.target.format}': choose {', '.join(self.formats)}, or "
                "another method"
            )
        drafts.check_statistics(label, draft, task.needs, False)
        spec = self.spec(task.target, self.options_of(task), linear.in_features)
        spec.stored(linear.in_features)  # which says whether the width can have it
        if not spec.alike and any(isinstance(x, ReassembledSpec) for x in draft.scheme.inputs):
            raise PlanError(
                f"{label}: an earlier step splits channels into copies, which have to be rounded alike, and "
                f"{spec.describe()} inputs depend on the channel's place: take one scale for each token (group_size: "
                "channel) or for all (tensor), or leave the step that splits out"
            )
        return replace(draft, scheme=replace(draft.scheme, activation=spec))

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """Inputs in float32, their codes and their values."""
        wide = max((x.in_features for x in linears), default=0)
        return Cost(ram=3 * 4 * run.batch * run.tokens * wide)
