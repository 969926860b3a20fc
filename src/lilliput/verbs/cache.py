"""The verb `cache`: how a written model stores the keys and values of the tokens that it has read.

Such a step changes no weight. It adds entries to the folder's config, which `lilliput.runtime.caches` carries out
wherever the folder is loaded, and possibly a few static tensors beside the weights, fitted to what each finished block
stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.runtime.caches.codec import CacheShape, CodecSpec
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Strict, Target
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes

GROUPS = (32, 16, 8, 4, 2, 1)


class Options(Strict):
    """What every method of the verb can be told."""

    layers: tuple[int, ...] | None = Field(
        None,
        description="blocks that store their cache so, from 0, or from the end below 0; none: all that can; of several "
        "steps the last one that names a block has it",
    )


@dataclass(frozen=True)
class CacheIO:
    """What a finished block stores on the calibration text, without the first `skipped` tokens of each sample.

    keys [n, heads, width] before their rotation by position, if the codec asks for that, and values [n, heads, width],
    float32. key_weights and value_weights, in their shapes: squared gradients of the loss by them, for a step that
    weighs by these.
    """

    shape: CacheShape
    keys: Tensor
    values: Tensor
    key_weights: Tensor | None = None
    value_weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cache(Spec[OptionsT]):
    """`codec(bits, group, options, turned)`: how keys and values are stored; group: neighbours that share a scale;
    turned: whether the model rotates keys by position. `uses`: the fields of a target that mean something to it.

    `fit(io, spec, options)`: the codec's static tensors, as it describes them (None: it has none); `samples(options)`:
    how many calibration samples it looks at, and `skipped(options)` how many first tokens of each it does not;
    `weighs(options)`: whether it reads squared gradients by what is stored. `trainable`: whether models may be trained
    with it: tokens see each other as they are stored, and nothing is fitted.
    """

    verb: ClassVar[str] = "cache"
    family: ClassVar[str] = "cache"
    single: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.CACHE

    codec: Callable[[int, int, OptionsT, bool], CodecSpec]
    uses: tuple[str, ...] = ("bits", "group_size")
    fit: Callable[[CacheIO, Any, OptionsT], Mapping[str, Tensor]] | None = None
    samples: Callable[[OptionsT], int] = lambda options: 0
    skipped: Callable[[OptionsT], int] = lambda options: 0
    weighs: Callable[[OptionsT], bool] = lambda options: False
    trainable: bool = False
    writes: Writes = "cache"

    def tokens(self, options: OptionsT) -> bool:
        return self.fit is not None

    def completed(self, target: Target) -> Target:
        bits = target.bits if target.bits is not None or "bits" not in self.uses else 4
        return target.model_copy(update={"bits": bits})

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        running = (Stage.RUNNING, Stage.CACHE, *((Stage.TRAINING,) if self.trainable else ()))
        later = next((x for x in recipe[task.step :] if x.spec.stage not in running), None)
        if later is not None and later.spec.stage is Stage.TRAINING:
            raise PlanError(
                f"{task.label} fits the cache to the model, or lets the tokens of a call see each other as they are, "
                f"which {later.label} would not: train with kv-rtn, or without a step for the cache"
            )
        if later is not None:
            raise PlanError(
                f"{task.label} says how the finished model stores keys and values, and {later.label} still changes it: "
                "move it to the end"
            )
        fields = Target.model_fields
        odd = sorted(x for x in set(fields) - set(self.uses) if getattr(task.target, x) != fields[x].default)
        if odd:
            raise PlanError(f"{task.label}: '{odd[0]}' says nothing about a cache: leave it out of the target")
        if task.target.group_size == "tensor":
            raise PlanError(f"{task.label}: a cache grows, so no scale is of all of it: give a number, or 'channel'")

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """Keys and values of all samples that it looks at, in float32: as they come, together, sorted with their
        places, and normalised."""
        if self.fit is None:
            return Cost()
        widths = sum(x.out_features for x in linears if x.role in ("k", "v", "qkv"))
        samples = min(run.samples, self.samples(options))
        if not self.weighs(options):
            return Cost(ram=32 * samples * run.tokens * widths)
        own = sum(x.out_features + x.in_features for x in linears if x.expert is None or x.expert < 2)
        # The squares of all samples, and what one leaves for the way back.
        ram = (32 + 8) * samples * run.tokens * widths + 3 * run.tokens * (own + 8 * run.hidden) * 4
        return Cost(ram=ram, operations=3 * samples * run.tokens * sum(x.parameters for x in linears))

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        if not self.weighs(options):
            return ()
        return (Phase("gradients for the cache", peak.of_gradients(run, outside=False)),)


def group_of(target: Target, shape: CacheShape) -> int:
    """Neighbours that share a scale, 0 for all channels of a head: where the target leaves it open, the most up to 32
    that divide the widths."""
    if target.group_size == "channel":
        return 0
    if target.group_size == "auto":
        return next(x for x in GROUPS if shape.keys % x == 0 and shape.values % x == 0)
    return int(target.group_size)


def chosen(options: Options, blocks: int) -> tuple[int, ...] | None:
    """The blocks that a step names, None for all. Raises PlanError for one that the model does not have."""
    if options.layers is None:
        return None
    wrong = [x for x in options.layers if not -blocks <= x < blocks]
    if wrong:
        raise PlanError(f"there is no block {wrong[0]}: the model has {blocks}, from 0 to {blocks - 1}")
    return tuple(sorted({x % blocks for x in options.layers}))
