"""What carries out the steps of a verb: one type of driver for each stage of a run.

The driver of a verb is one file of `drivers/`, which declares it as `DRIVER`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lilliput.folds.kinds import Fold
from lilliput.machine.cost import Cost
from lilliput.model.block import BlockWeights
from lilliput.model.stored import Model
from lilliput.parts.layer import Layer
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run.journal import Work
from lilliput.runtime.caches.codec import CodecSpec
from lilliput.stats.site import SiteStats
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.behave import MlpIO
from lilliput.verbs.cache import CacheIO
from lilliput.verbs.spec import Spec, Stage, Task
from lilliput.verbs.view import BlockFit, BlockIO, BlockView, FitBlock, FitIO


def nothing(plan: Plan, task: Task, model: Model) -> Cost:
    """No more than every run takes."""
    return Cost()


def no_files(task: Task) -> tuple[str, ...]:
    """None."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Driver:
    """`verb`: the spec whose steps it runs; `cost`: what a step takes on disk at once, beyond what every run does;
    `files`: names in the work folder that the block loop still needs of a step."""

    stage: ClassVar[Stage]

    verb: type[Spec[Any]]
    cost: Callable[[Plan, Task, Model], Cost] = nothing
    files: Callable[[Task], tuple[str, ...]] = no_files


@dataclass(frozen=True, kw_only=True)
class ModelDriver(Driver):
    """`run`: the model that later steps see. ids [N, T] are all samples; what is decided is in the journal."""

    stage: ClassVar[Stage] = Stage.MODEL

    run: Callable[[Plan, Task, Model, Tensor | None, Work, Progress], Model]


@dataclass(frozen=True, kw_only=True)
class TargetsDriver(Driver):
    """`run`: the plan with the targets that the step decides on; `again`: the same from the journal of a run whose
    blocks are finished."""

    stage: ClassVar[Stage] = Stage.TARGETS

    run: Callable[[Plan, Task, Model, Tensor | None, Work, Progress], Plan]
    again: Callable[[Plan, Task, Model, Work], Plan]


@dataclass(frozen=True, kw_only=True)
class BlockDriver(Driver):
    """`run`: folds that leave the block's function as it is, the same for all ranks, of which the leader sees the
    weights."""

    stage: ClassVar[Stage] = Stage.BLOCK

    run: Callable[[Task, BlockView, BlockIO], Sequence[Fold]]


@dataclass(frozen=True, kw_only=True)
class RepairDriver(Driver):
    """`run`: new weights [out, in] by linear for a loaded block of an edited model, before anything else happens to
    it."""

    stage: ClassVar[Stage] = Stage.BLOCK

    run: Callable[[Task, Model, BlockWeights, int, Batches, Activations, Any], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LinearDriver(Driver):
    """`run`: the layer after the step, by the statistics of what enters it between its transforms."""

    stage: ClassVar[Stage] = Stage.LINEAR

    run: Callable[[Task, Layer, SiteStats], Layer]


@dataclass(frozen=True, kw_only=True)
class CloseDriver(Driver):
    """`run`: the layers of a block fitted together, by linear as the targets are."""

    stage: ClassVar[Stage] = Stage.CLOSE

    run: Callable[[Task, FitBlock, FitIO, Mapping[str, Target]], BlockFit]


@dataclass(frozen=True, kw_only=True)
class RunningDriver(Driver):
    """`run`: tensors that a finished block needs for the way in which it will run, by their names below its MLP."""

    stage: ClassVar[Stage] = Stage.RUNNING

    run: Callable[[Task, MlpIO], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class CacheDriver(Driver):
    """`run`: static tensors by which a finished block stores keys and values, by their own names."""

    stage: ClassVar[Stage] = Stage.CACHE

    run: Callable[[Task, CodecSpec, CacheIO], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrainingDriver(Driver):
    """A training step works on the finished folder; see `lilliput.run.training`."""

    stage: ClassVar[Stage] = Stage.TRAINING
