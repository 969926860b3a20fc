"""The verb `adapt`: an adapter is trained beside the finished folder, which stays as it is, byte for byte.

What is trained is an `Adapter`: modules that a method puts into transformers' model, around linears that stay packed.
Everything else is that of any training step (`lilliput.verbs.train`): the objective, text, optimizer and schedule. The
adapter is written into a folder of its own below the written one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import PlanError
from lilliput.parts.scheme import Scheme
from lilliput.target import Target
from lilliput.verbs.spec import OptionsT, Task
from lilliput.verbs.train import Learning, TrainOptions, moved
from lilliput.verbs.trained import Leaves


class AdapterOptions(TrainOptions):
    """What every step that trains an adapter can be told."""

    lr: float = Field(2e-4, gt=0.0, description="learning rate after warming up")
    into: str = Field(
        "adapter", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="folder of the adapter, below the written one"
    )


@dataclass(frozen=True)
class Adaptable:
    """A linear beside which something is trained. name: of its module; `decoded()`, `original()`: its weight as the
    folder holds it, and before it was compressed, float32 [out, in]."""

    name: str
    block: int
    linear: Linear
    scheme: Scheme
    decoded: Callable[[], Tensor]
    original: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features


@dataclass(frozen=True)
class AdaptIO:
    """The model with all that the folder holds of it in place, and the linears that the step covers."""

    skeleton: Skeleton
    linears: Sequence[Adaptable]


class Adapter(Leaves):
    """What is trained, inside the model that `attach` was given or in front of what it reads."""

    def read(self, skeleton: Skeleton, ids: Tensor, positions: Tensor | None, cache: Any) -> Tensor:
        """As `Skeleton.read`, with the adapter."""
        return skeleton.read(ids, positions, cache)

    def save(self, folder: Path) -> None:
        """Write it into a new folder, with all that says how to load it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Adapt(Learning[OptionsT]):
    """`attach(io, target, options)`: the adapter, put in its place; before the first step the model computes what it
    did, where the options do not say otherwise. `on(linear, options)`: whether it has to do with a linear at all.
    `admits(linear, scheme, target, options)`: why a linear that is stored so cannot have one; None where it can.
    `refuses(config, options)`: why a model of this config can have none. `parameters(linears, target, options)`: how
    many numbers are trained beside these linears; `fixed(hidden, blocks, options)`: and how many of a model, whatever
    its linears are. `borrows`: it is one of peft's. `adds(options)`: how many positions it puts in front of the text,
    so that what the model shows of its tokens cannot be compared. `covering`: whether `where` says which linears.
    """

    verb: ClassVar[str] = "adapt"
    family: ClassVar[str] = "adapter"

    attach: Callable[[AdaptIO, Target, OptionsT], Adapter]
    admits: Callable[[Linear, Scheme, Target, OptionsT], str | None] = lambda linear, scheme, target, options: None
    parameters: Callable[[Sequence[Linear], Target, OptionsT], int] = lambda linears, target, options: 0
    fixed: Callable[[int, int, OptionsT], int] = lambda hidden, blocks, options: 0
    on: Callable[[Linear, OptionsT], bool] = lambda linear, options: True
    refuses: Callable[[Any, OptionsT], str | None] = lambda config, options: None
    borrows: bool = True
    adds: Callable[[OptionsT], int] = lambda options: 0
    covering: bool = True

    def works_on(self, linear: Linear, options: OptionsT) -> bool:
        return self.on(linear, options)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        later = next(iter(recipe[task.step + 1 :]), None)
        if later is not None:
            raise PlanError(
                f"{later.label} would change the model that {task.label} has trained an adapter for: put the adapter "
                "last, and train one of them in a run"
            )
        if settings(task.options).others:
            raise PlanError(
                f"{task.label}: an adapter leaves every tensor of the folder as it is, and `others` would train some: "
                "leave it out, or train them before with a step such as `full`"
            )
        changed = moved(recipe[: task.step])
        if changed is not None:
            self.begins(task, changed)

    def suits_all(self, task: Task, linears: Mapping[str, tuple[Linear, Scheme]]) -> None:
        """Raises PlanError for a linear that cannot have an adapter."""
        for name, (linear, scheme) in linears.items():
            reason = self.admits(linear, scheme, task.target, self.options_of(task))
            if reason is not None:
                raise PlanError(f"{task.label} on {name}: {reason}")


def settings(options: Any) -> AdapterOptions:
    """The options that all steps of this verb have. Raises RuntimeError for those of another one."""
    if not isinstance(options, AdapterOptions):
        raise RuntimeError("these are no options of an adapter")
    return options
