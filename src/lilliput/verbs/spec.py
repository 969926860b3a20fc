"""What the specs of all verbs share, and what they look at: a method, a step that runs it, and what surrounds the step.

A verb is one file beside this one: a frozen spec that every method of the verb fills in, with the verb's own rules of
order. The folder of the methods is the verb's `family`; `Spec.stage` says when a run carries its steps out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from lilliput.anatomy.model import Anatomy, Linear
from lilliput.errors import PlanError, nearest
from lilliput.machine.cost import Cost, Phase
from lilliput.parts.part import PartSpec
from lilliput.parts.scheme import Scheme
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs.draft import Draft, checked

FISHER = "fisher"  # among a method's needs: no statistic of inputs, but squared gradients by weight
OptionsT = TypeVar("OptionsT", bound=BaseModel)
SpecT = TypeVar("SpecT", bound="Spec[Any]")
Steps = list[dict[str, Any]]
Writes = Literal["quantized", "parts", "support", "fold", "targets", "behaviour", "inputs", "cache", "values"]


class Stage(Enum):
    """When the steps of a verb are carried out; a run goes through the stages in this order."""

    MODEL = "the whole model, before any block is looked at"
    TARGETS = "the targets of later steps, before the first block is changed"
    BLOCK = "a block whose linears are as they were"
    LINEAR = "a linear, or all linears of a site, when their inputs have arrived"
    CLOSE = "a block whose linears are done, as a whole"
    RUNNING = "a finished block, as it will run"
    CACHE = "the keys and values of a finished block"
    TRAINING = "the whole model, once all blocks are done"


@dataclass(frozen=True, kw_only=True)
class Spec(Generic[OptionsT]):
    """A method as its file declares it.

    `needs`: names of site statistics, or "fisher"; `reads`: which of them it takes with these options (None: all);
    `fisher_samples`: of how many calibration samples it asks squared gradients (None, or a number of None: of all);
    `covers`: catalogue id to the recipe that runs it (a list of steps as plain data), or None where the id is an idea
    and no computation, or a sentence where it cannot be run yet; `baseline`: the method whose error this one must beat
    (None: it is a baseline); `recipe`: the steps that run the method where it cannot run alone, or why none do;
    `formats`: the target's formats that it can have (None: every one); `default`: fields of the target for a step that
    names none of them; `note`: what the plan says of a recipe that has it.
    """

    verb: ClassVar[str]
    family: ClassVar[str]
    stage: ClassVar[Stage]
    prepares: ClassVar[bool] = False  # it makes weights easier for the step that quantizes, and takes that one's target
    settles: ClassVar[bool] = False  # it decides the values of weights
    turns: ClassVar[bool] = False  # the model has to be one that can be rotated while it is read
    single: ClassVar[bool] = False  # its steps look at all samples in one process
    targeted: ClassVar[bool] = True  # its steps have a target, and touch the linears that `where` names

    paper: str
    options: type[OptionsT]
    needs: tuple[str, ...]
    writes: Writes
    covers: Mapping[str, Steps | str | None]
    baseline: str | None = None
    recipe: Steps | str | None = None
    reads: Callable[[OptionsT], tuple[str, ...]] | None = None
    fisher_samples: Callable[[OptionsT], int | None] | None = None
    formats: tuple[str, ...] | None = None
    default: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None

    def read(self, options: OptionsT) -> frozenset[str]:
        """What a step with these options reads, of `needs`."""
        return frozenset(self.needs if self.reads is None else self.reads(options))

    def folds(self, options: OptionsT) -> bool:
        """Whether a step with these options changes what weights stand for, so that they are no longer those of the
        original."""
        return self.writes == "fold"

    def needed(self, target: Target, options: OptionsT) -> frozenset[str]:
        """What a step with this target and these options reads, of `needs`."""
        return self.read(options)

    def options_of(self, task: Task) -> OptionsT:
        """A step's options, as the method's own type. Raises RuntimeError where they are another method's."""
        if not isinstance(task.options, self.options):
            raise RuntimeError(f"{task.label} has options of another method")
        return task.options

    def completed(self, target: Target) -> Target:
        """The target with the method's own values for what it leaves open. Rank and ratio stand for each other."""
        named = target.model_dump(exclude_none=True).keys()
        added: dict[str, Any] = {}
        if self.writes == "quantized" or self.prepares:
            added["bits"] = 4
        if self.writes == "support" and target.pattern is None:
            added["sparsity"] = 0.5
        added |= self.default
        fixed = named | ({"rank", "ratio"} if named & {"rank", "ratio"} else set())
        return target.model_copy(update={key: value for key, value in added.items() if key not in fixed})

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        """Raises PlanError where the step cannot stand where it does among the steps of the recipe."""

    def inherited(self, task: Task, before: Sequence[Task], asked: Target | None, name: str) -> Target:
        """The step's target on the linear `name`, after the steps `before` on it; `asked` is the target in the recipe.

        Raises PlanError where the two disagree.
        """
        return task.target

    def accompanied(self, task: Task, tasks: Sequence[Task], name: str) -> None:
        """Raises PlanError where not all of `tasks` can work on the linear `name` with this one."""

    def drafted(self, task: Task, later: Sequence[Task], name: str, linear: Linear, draft: Draft) -> Draft:
        """What the step makes of a linear; `later` are the steps after it on the linear. Raises PlanError where it
        cannot."""
        return draft

    def stacks(self, target: Target, options: OptionsT) -> bool:
        """Whether linears of one site may be shown to a step with this target and these options as one."""
        return False

    def opens(self, draft: Draft, linear: Linear) -> PartSpec | None:
        """What the kept weights of a pruned linear become before the step fills the zeros; None: it fills none, or the
        weights are parts already."""
        return None

    def scheme_of(self, target: Target, options: OptionsT, rows: int, width: int) -> Scheme:
        """What the step adds to a [rows, width] linear. Raises PlanError where it cannot have this target on it."""
        return Scheme()

    def suits(self, task: Task, around: Around) -> None:
        """Raises PlanError where the method cannot do what its step asks for on this model."""

    def trains(self, task: Task, schemes: Mapping[str, Scheme]) -> None:
        """Raises PlanError where a step that trains finished linears cannot train one of these, by name."""

    def farthest(self, target: Target, options: OptionsT) -> tuple[Target, ...]:
        """The targets farthest apart that the step may give linears with this one; none: its decision is no matter of
        layouts."""
        return ()

    def works_on(self, linear: Linear, options: OptionsT) -> bool:
        """Whether a step with these options works on the linear, if its `where` covers it."""
        return True

    def together(self, name: str, linear: Linear, options: OptionsT) -> str:
        """What the linear `name` shares with all that must get one target with it: by default nothing but itself."""
        return name

    def tokens(self, options: OptionsT) -> bool:
        """Whether it looks at calibration samples beside the statistics that it reads."""
        return False

    def observes(self, governed: Sequence[Task]) -> bool:
        """Whether it takes a pass of its own over the calibration samples; `governed` are the steps that it decides
        about."""
        return self.stage in (Stage.MODEL, Stage.TARGETS)

    def tabular(self) -> bool:
        """Whether it can quantize an embedding or a head a few rows at a time."""
        return False

    def plain(self, options: OptionsT) -> bool:
        """Whether a step with these options leaves a plain weight of its own, which no other step may touch."""
        return False

    def rounds(self, options: OptionsT) -> int:
        """How often every weight is rounded to its format."""
        return 1

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """What it takes on linears that it works on at once, beside the pass that has brought it there; operations
        are those beyond the passes that the plan counts for every step."""
        return Cost()

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        """What its own passes over the model take, where it makes any."""
        return ()

    def resident(self, target: Target, options: OptionsT) -> int:
        """Bytes that stay from its own passes to the end of the run, beside what its target's format works in."""
        return 0


@dataclass(frozen=True)
class Method:
    """A discovered method file: its public name, its docstring and its spec."""

    name: str
    spec: Spec[Any]
    doc: str

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.doc.splitlines()[0]

    @property
    def options(self) -> type[BaseModel]:
        """The type of its options."""
        options: type[BaseModel] = self.spec.options
        return options

    @property
    def recipe(self) -> Steps | str:
        """The steps that run it by default, or why none do."""
        return [{"method": self.name}] if self.spec.recipe is None else self.spec.recipe

    def scheme(self, target: Target, options: BaseModel, rows: int, width: int) -> Scheme:
        """What the step adds to a [rows, width] linear.

        Raises PlanError where the method or format cannot have this target on a matrix of this shape.
        """
        formats = self.spec.formats
        if formats is not None and target.format not in formats:
            raise PlanError(f"'{self.name}' has no format '{target.format}': choose {', '.join(formats)}, or rtn")
        return checked(self.spec.scheme_of(target, options, rows, width), rows, width)

    def parse(self, options: Mapping[str, Any]) -> BaseModel:
        """Options as the method's own type. Raises PlanError that names the option, the rule and the nearest name."""
        fields = self.options.model_fields
        for key in options:
            if key not in fields:
                raise PlanError(f"method '{self.name}' has no option '{key}'.{nearest(key, fields)}")
        try:
            parsed = self.options.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(x) for x in first["loc"])
            raise PlanError(
                f"option '{where}' of method '{self.name}': {first['msg']}, got {first['input']!r}"
            ) from None
        return parsed


@dataclass(frozen=True)
class Task:
    """One step, with everything decided; `step` is its place in the recipe, `first` what it makes of the kept weights
    of a pruned linear before it adds to them."""

    step: int
    method: Method
    target: Target
    options: BaseModel
    first: PartSpec | None = None

    @property
    def spec(self) -> Spec[Any]:
        return self.method.spec

    @property
    def label(self) -> str:
        """As a user reads it, counted from 1: "step 2 (gptq)"."""
        return f"step {self.step + 1} ({self.method.name})"

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the step reads with these options; a method may need fewer than it declares."""
        return self.spec.needed(self.target, self.options) - {FISHER}

    @property
    def fisher(self) -> bool:
        """Whether the step weighs by squared gradients of the whole model's loss."""
        return FISHER in self.spec.read(self.options)

    def of(self, kind: type[SpecT]) -> SpecT:
        """The spec as that of its verb. Raises RuntimeError where it is another one's."""
        if not isinstance(self.spec, kind):
            raise RuntimeError(f"{self.label} is no {kind.verb}: it is {self.spec.verb}")
        return self.spec

    def cost(self, run: Run, linears: Sequence[Linear]) -> Cost:
        """See `Spec.cost`."""
        return self.spec.cost(run, linears, self.options)

    def phases(self, run: Run) -> tuple[Phase, ...]:
        """See `Spec.phases`; squared gradients that it reads take a backward pass."""
        phases: tuple[Phase, ...] = self.spec.phases(run, self.options)
        if not self.fisher:
            return phases
        return (*phases, Phase("the backward pass for squared gradients", peak.of_gradients(run, outside=False)))

    def resident(self) -> int:
        """See `Spec.resident`."""
        return self.spec.resident(self.target, self.options)

    def fisher_samples(self, samples: int) -> int:
        """Of how many of `samples` calibration samples the step asks squared gradients; 0: of none."""
        if not self.fisher:
            return 0
        count = None if self.spec.fisher_samples is None else self.spec.fisher_samples(self.options)
        return samples if count is None else min(count, samples)


@dataclass(frozen=True)
class Around:
    """What a step finds on a model once all steps are resolved.

    `width`: of the residual stream; `quantized`: by linear, the target of the step that quantizes it; `governed`: by
    linear, the step whose target this one may decide, which is the next one after it on that linear; `rounded`: the
    linears whose inputs a step rounds.
    """

    anatomy: Anatomy
    width: int
    recipe: Sequence[Task]
    quantized: Mapping[str, Target]
    governed: Mapping[str, Task]
    rounded: frozenset[str] = frozenset()
